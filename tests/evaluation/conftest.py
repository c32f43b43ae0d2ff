# SPDX-License-Identifier: Apache-2.0
"""Published networks in small and at random, laid out as a user would."""

import json

import foreign
import pytest
from safetensors.numpy import save_file


@pytest.fixture(scope="session")
def networks(tmp_path_factory):
    folder, golden = tmp_path_factory.mktemp("networks"), foreign.golden()
    (folder / "clip").mkdir()
    save_file(foreign.weights(golden["clip"]["shapes"]), folder / "clip" / "model.safetensors")
    (folder / "clip" / "config.json").write_text(json.dumps(foreign.CLIP))
    vocabulary, merges = foreign.byte_pairs()
    (folder / "clip" / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "clip" / "merges.txt").write_text("\n".join(map(" ".join, merges)))
    (folder / "videomae").mkdir()
    save_file(foreign.weights(golden["videomae"]["shapes"]), folder / "videomae" / "model.safetensors")
    (folder / "videomae" / "config.json").write_text(json.dumps(foreign.VIDEOMAE))
    return folder
