# SPDX-License-Identifier: Apache-2.0
"""The page has the model's weights, and a click shows those of the patch that was clicked."""

import base64
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from stvdm.sampling import inspection
from stvdm.sampling.attention_page import attention_page
from stvdm.sampling.pipeline import Pipeline

RED = "a red ball moves"

# As much of a browser as the page's script asks for: then token 7 is clicked, in layer 1 and head 0.
BROWSER = """
const made = [];
const frames = [0, 1, 2].map(() => ({children: [], appendChild(cell) { this.children.push(cell); }}));
const selects = {".layer": {value: "0"}, ".head": {value: "1"}};
globalThis.document = {
  getElementById: () => ({querySelector: name => selects[name], querySelectorAll: () => frames}),
  createElement: () => { const cell = {style: {}}; made.push(cell); return cell; },
};
SCRIPT
const shown = () => made.map(cell => Number(cell.style.background.match(/([0-9.e-]+)\\)$/)[1]) * 255);
const marked = () => made.map((cell, n) => cell.style.boxShadow === "none" ? -1 : n).filter(n => n >= 0);
const first = {shown: shown(), marked: marked()};
made[7].onclick();
selects[".layer"].value = "1"; selects[".head"].value = "0"; selects[".layer"].onchange();
const then = {shown: shown(), marked: marked()}, perFrame = frames.map(frame => frame.children.length);
console.log(JSON.stringify({first, then, perFrame}));
"""


@pytest.fixture(scope="module")
def look(tiny_model):
    pipeline = Pipeline.load(tiny_model)
    result = pipeline.generate([RED])
    given = (pipeline, result.videos[0], result.latents[0], RED)
    weights = np.stack(
        [
            inspection.gaze_of(pipeline, result.latents[0], RED, at=at, time=0.4).video_LAthw.reshape(2, 2, 12)
            for at in [(frame, y, x) for frame in (0, 1, 3) for y in (0, 8) for x in (0, 8)]
        ],
        axis=2,
    )  # (L, A, N, N)
    return given, weights, attention_page(*given, time=0.4, head=(0, 1), side=32)


def scaled(weights):
    return 255 * weights / weights.max()


def test_it_holds_the_weights_of_all_patches(look):
    _, weights, page = look
    (packed,) = re.findall(r'atob\("([^"]+)"\)', page)
    held = np.frombuffer(base64.b64decode(packed), np.uint8).reshape(2, 2, 12, 12)
    expected = 255 * weights / weights.max(axis=-1, keepdims=True)
    assert np.abs(held - expected).max() <= 0.51
    assert page.count('class="frame"') == page.count("data:image/png;base64,") == 3
    assert '<option value="1" selected>head 1</option>' in page
    assert "{" + "{" not in page  # no braces of the template are left


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node to run its script")
def test_a_click_shows_what_that_patch_attends_to(look):
    _, weights, page = look
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.S)
    ran = subprocess.run(
        ["node", "-"], input=BROWSER.replace("SCRIPT", script), capture_output=True, text=True, check=True, timeout=60
    )
    found = json.loads(ran.stdout)
    assert found["perFrame"] == [4, 4, 4]
    assert found["first"]["marked"] == [6] and found["then"]["marked"] == [7]
    np.testing.assert_allclose(found["first"]["shown"], scaled(weights[0, 1, 6]), atol=0.51)
    np.testing.assert_allclose(found["then"]["shown"], scaled(weights[1, 0, 7]), atol=0.51)


def test_too_many_weights_are_refused(look, monkeypatch):
    from stvdm.sampling import attention_page as module

    monkeypatch.setattr(module, "MOST_BYTES", 100)
    with pytest.raises(ValueError, match="12 tokens in 2 layers of 2 heads: 576 weights, and a page holds 100"):
        attention_page(*look[0])
