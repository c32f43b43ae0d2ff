# SPDX-License-Identifier: Apache-2.0
"""What a step of the transformer is given: what is refused, what is sampled on the way, where padding is looked at."""

import numpy as np
import pytest

from stvdm.data import records
from stvdm.sampling import pipeline
from stvdm.train import dit


def test_latents_of_another_autoencoder_are_refused(dit_config, tmp_path):
    records.write_shard(
        tmp_path, 0, [{"latent": np.zeros((3, 4, 4, 4), np.float16), "shape": [5, 16, 16], "caption": "a ball"}]
    )
    records.finish(tmp_path, num_shards=1, about={"autoencoder": "f" * 64})
    with pytest.raises(ValueError, match="latents of an autoencoder with sha256 ffffffffffff..., expected that of"):
        dit.main(dit_config(total_steps=1, data__source="latents", data__path=str(tmp_path)), tmp_path / "run")


def test_clips_that_the_patches_do_not_divide_are_refused(dit_config, tmp_path):
    with pytest.raises(ValueError, match=r"data.buckets \(5, 16, 20\): width=20: .* use a multiple of"):
        dit.main(dit_config(total_steps=1, data__buckets=((5, 16, 20, 8, 1.0),)), tmp_path)


def test_previews_are_prompts_it_can_read_or_held_out_captions(dit_config, tmp_path, one_device):
    with pytest.raises(ValueError, match=r"sample.previews: prompt 'a giraffe': the model never saw .*'\(\)'"):
        dit.main(dit_config(total_steps=1, sample__previews=("a giraffe",)), tmp_path)
    with pytest.raises(ValueError, match=r"sample.negative: prompt 'blurry': the model never saw .*negative="):
        dit.main(dit_config(total_steps=1, sample__negative="blurry"), tmp_path)
    dit.main(dit_config(total_steps=1, sample__previews=(), eval_every=1, eval_batches=1), tmp_path)
    assert (tmp_path / "previews" / "samples-00000001.png").exists()


def test_text_that_another_tower_read_is_refused(tower_config, tmp_path, one_device):
    config = tower_config(stored=True)
    config.text.max_tokens = 90
    with pytest.raises(ValueError, match=r"its text was read by .*'max_tokens': 96.*, expected .*'max_tokens': 90"):
        dit.main(config, tmp_path / "run")
    config.text.update(dict(max_tokens=96, width=32))
    with pytest.raises(ValueError, match="text.width=32: the tower .* gives 24; set text.width=24"):
        dit.main(config, tmp_path / "run")


def test_padding_that_is_seen_is_zeros(tower_config):
    """As Wan's pipeline: what stands behind the text is looked at, and is zero."""
    seen = []
    for padding in ("masked", "zeros"):
        config = tower_config(stored=False, padding=padding)
        reader = pipeline.reader_of(config.to_dict())
        text_BSE, mask_BS = pipeline.read_captions(reader, ["on", ""], config.to_dict())
        assert not np.asarray(text_BSE)[:, 4:].any()
        seen.append(mask_BS.sum(1).tolist())
    assert seen == [[3, 2], [96, 96]]
