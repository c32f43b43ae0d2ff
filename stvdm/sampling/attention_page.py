# SPDX-License-Identifier: Apache-2.0
"""A page on which a click on a patch of a clip shows what it attends to in all frames; in a notebook, or as a file.

    from IPython.display import HTML
    HTML(attention_page(pipeline, result.videos[0], result.latents[0], result.prompts[0]))

All weights are in the page, a byte each, so it needs no server, no kernel and no other file.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json

import numpy as np
from PIL import Image

from stvdm import shapes
from stvdm.sampling import inspection
from stvdm.sampling.pipeline import Pipeline

MOST_BYTES = 16 << 20  # of weights in one page


def attention_page(
    pipeline: Pipeline,
    video_THWC: np.ndarray,
    latent_thwz: np.ndarray,
    prompt: str,
    *,
    time: float = 0.3,
    seed: int = 0,
    head: tuple[int, int] = (0, 0),
    side: int = 160,
) -> str:
    """HTML of a clip whose patches can be clicked; orange is attention, relative to the most that the patch gives.

    Args:
      video_THWC: uint8, what is shown: of each frame of tokens the last frame of pixels.
      latent_thwz, prompt, time, seed: what the model looks at, as of `inspection.gaze_of`.
      head: the (layer, head) that is shown at first.
      side: height of a frame on the page, in pixels of the screen.

    Raises:
      ValueError: if there are more weights than a page should hold; and those of `inspection.gaze_of`.
    """
    geometry = inspection.geometry_of(pipeline)
    grid = shapes.token_grid(latent_thwz.shape[:3], geometry["patch"])
    t, h, w = grid
    num_layers, num_heads = pipeline.settings["model"]["num_layers"], pipeline.settings["model"]["num_heads"]
    size = num_layers * num_heads * (t * h * w) ** 2
    if size > MOST_BYTES:
        raise ValueError(
            f"{t * h * w} tokens in {num_layers} layers of {num_heads} heads: {size:,} weights, and a page holds "
            f"{MOST_BYTES:,}; take a shorter or smaller clip, or look at single patches with inspection.gaze_of."
        )
    found, _ = inspection.weights_of(pipeline, latent_thwz, prompt, np.arange(t * h * w), time=time, seed=seed)
    weights_LANM = np.asarray(found.video_LBQAN)[:, 0].swapaxes(1, 2)  # M: the tokens that are looked at
    bytes_LANM = np.round(255 * weights_LANM / np.maximum(weights_LANM.max(axis=-1, keepdims=True), 1e-12))
    last = [shapes.pixels_of_token((frame, 0, 0), **geometry)[0].stop - 1 for frame in range(t)]
    packed = base64.b64encode(bytes_LANM.astype(np.uint8).tobytes()).decode()
    name = "attention-" + hashlib.sha256(packed.encode()).hexdigest()[:12]
    height, width = side, round(side * video_THWC.shape[2] / video_THWC.shape[1])
    frames = [
        f'<div class="frame" style="background-image: url({_picture(video_THWC[frame])})"></div>' for frame in last
    ]
    return _PAGE.format(
        name=name,
        layers=_options("layer", num_layers, head[0]),
        heads=_options("head", num_heads, head[1]),
        frames="".join(frames),
        size=f"width: {width}px; height: {height}px; grid-template: repeat({h}, 1fr) / repeat({w}, 1fr)",
        numbers=json.dumps([num_heads, t * h * w, h * w]),
        packed=packed,
    )


def _options(word: str, count: int, chosen: int) -> str:
    options = (
        f'<option value="{number}"{" selected" * (number == chosen)}>{word} {number}</option>'
        for number in range(count)
    )
    return f'<select class="{word}">{"".join(options)}</select>'


def _picture(frame_HWC: np.ndarray) -> str:
    """A frame in dark grey, as the address of a PNG that holds it."""
    opened = io.BytesIO()
    Image.fromarray((0.6 * frame_HWC.mean(axis=-1)).round().astype(np.uint8)).save(opened, "PNG")
    return f"data:image/png;base64,{base64.b64encode(opened.getvalue()).decode()}"


_PAGE = """<div id="{name}">
<style>
  #{name} .frames {{ display: flex; flex-wrap: wrap; gap: 6px }}
  #{name} .frame {{ display: grid; cursor: pointer; background-size: 100% 100%; image-rendering: pixelated; {size} }}
</style>
<p>Click a patch: {layers} {heads}</p>
<div class="frames">{frames}</div>
<script>(() => {{
  const page = document.getElementById("{name}"), cells = [];
  const [numHeads, numTokens, tokensPerFrame] = {numbers};
  const weights = Uint8Array.from(atob("{packed}"), letter => letter.charCodeAt(0));
  const selects = [page.querySelector(".layer"), page.querySelector(".head")];
  let chosen = Math.floor(numTokens / 2);
  const draw = () => {{
    const [layer, head] = selects.map(select => Number(select.value));
    const row = ((layer * numHeads + head) * numTokens + chosen) * numTokens;
    cells.forEach((cell, token) => {{
      cell.style.background = `rgba(255, 140, 0, ${{weights[row + token] / 255}})`;
      cell.style.boxShadow = token === chosen ? "inset 0 0 0 2px lime" : "none";
    }});
  }};
  for (const frame of page.querySelectorAll(".frame"))
    for (let place = 0; place < tokensPerFrame; place++) {{
      const cell = document.createElement("div"), token = cells.length;
      cell.onclick = () => {{ chosen = token; draw(); }};
      cells.push(cell);
      frame.appendChild(cell);
    }}
  for (const select of selects) select.onchange = draw;
  draw();
}})();</script>
</div>
"""
