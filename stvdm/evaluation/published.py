# SPDX-License-Identifier: Apache-2.0
"""What published networks say of clips, where their weights are at hand: CLIP score, LPIPS, and the features that
Frechet video distances look at.

    judges = Judges.load("networks")        # a folder with any of clip/ i3d/ videomae/ lpips/
    judges.clip_score(videos, captions)     # (B,) one number for each clip
    judges.lpips_distance(rebuilt, videos)  # (B,)
    distances(judges.features("i3d", made), judges.features("i3d", real))["frechet"]      # FVD; see `instruments`

Weights come from their authors, as safetensors; none are in this package. Videos are uint8 (B, T, H, W, 3). Products
are float32 on every device, so that numbers agree with those of the references. Batches have one compiled shape.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from stvdm.interop import judges
from stvdm.models import clip, i3d, videomae

NAMES = ("clip", "i3d", "videomae", "lpips")
OF_VIDEOS = ("i3d", "videomae")  # those that give features of clips


@dataclasses.dataclass(frozen=True)
class Judges:
    """The networks of a folder; a score whose network is not there raises."""

    clip: judges.Clip | None = None
    i3d: judges.Network | None = None
    videomae: judges.Network | None = None
    lpips: judges.Network | None = None

    @classmethod
    def load(cls, folder: epath.PathLike) -> Judges:
        """What is in ``folder``: a subfolder of safetensors for each of `NAMES`, any of them.

        Raises:
          ValueError: if it has none of these, or one that is not what its name says.
        """
        source = epath.Path(folder).expanduser()
        found = [name for name in NAMES if (source / name).exists()]
        if not found:
            raise ValueError(
                f"--features={folder}: expected a folder with any of {', '.join(f'{name}/' for name in NAMES)}, each "
                "with the safetensors that its authors published."
            )
        return cls(**{name: getattr(judges, name)(source / name) for name in found})

    def digests(self) -> dict[str, str]:
        """Network -> SHA-256 of its weights as they are used: scores of two networks of one name are not comparable."""
        found = {}
        for name in NAMES:
            if (network := getattr(self, name)) is not None:
                digest = hashlib.sha256()
                for leaf in jax.tree.leaves(network.params):
                    digest.update(np.asarray(leaf).tobytes())
                found[name] = digest.hexdigest()
        return found

    def clip_score(self, videos: np.ndarray, captions: Sequence[str], *, batch: int = 32) -> np.ndarray:
        """`clip_score` of each clip and its caption: the mean over all its frames; (B,).

        Raises:
          ValueError: without CLIP, or with another number of captions than clips.
        """
        model, params, tokenizer = self._need("clip")
        if len(videos) != len(captions):
            raise ValueError(f"{len(videos)} clips and {len(captions)} captions: expected one caption for each clip.")
        read, look = _read(model), _look(model)
        tokens, _ = tokenizer(captions)
        text_BE = in_batches(lambda tokens: read(params, tokens), tokens, batch=batch)

        def see(frames: np.ndarray) -> jax.Array:
            return look(params, clip.prepare(frames, model.image.image_size))

        B, T = videos.shape[:2]
        image_BTE = in_batches(see, videos.reshape(B * T, *videos.shape[2:]), batch=batch).reshape(B, T, -1)
        return np.stack([clip_score(text, images) for text, images in zip(text_BE, image_BTE, strict=True)])

    def features(self, name: str, videos: np.ndarray, *, batch: int = 4) -> np.ndarray:
        """(B, D) of clips: of "i3d" its 400 logits, for FVD; of "videomae" its mean token behind the last norm.

        Frames are stretched to 224 x 224 bilinearly, without smoothing. I3D sees all of a clip, at least 9 frames;
        VideoMAE its first 16. Sets that are compared need one length and one frame rate.

        Raises:
          ValueError: without that network, or for clips that are too short for it.
        """
        model, params = self._need(name)
        if name == "videomae":

            def look(clips: np.ndarray) -> jax.Array:
                return apply(
                    params, videomae.prepare(clips, num_frames=model.num_frames, size=model.image_size)
                ).features_BD
        else:

            def look(clips: np.ndarray) -> jax.Array:
                return apply(params, i3d.prepare(clips))

        apply = _apply(model)
        return in_batches(look, videos, batch=batch)

    def lpips_distance(self, videos: np.ndarray, originals: np.ndarray, *, batch: int = 32) -> np.ndarray:
        """LPIPS of each clip and its original: the mean over frames, at their own size; (B,).

        Raises:
          ValueError: without LPIPS, or for clips of different shapes.
        """
        model, params = self._need("lpips")
        if videos.shape != originals.shape:
            raise ValueError(f"clips of {videos.shape} and {originals.shape}: expected each with its original.")
        apply = _apply(model)
        B, T = videos.shape[:2]
        frames = [clips.reshape(B * T, *clips.shape[2:]) for clips in (videos, originals)]

        def compare(one: np.ndarray, other: np.ndarray) -> jax.Array:
            return apply(params, one / np.float32(127.5) - 1, other / np.float32(127.5) - 1)

        return in_batches(compare, *frames, batch=batch).reshape(B, T).mean(axis=1)

    def try_on(self, videos: np.ndarray) -> None:
        """Has them look at clips, so that such as these are refused before others are made.

        Raises:
          ValueError: for clips that are too short or too small for one of them.
        """
        for name in OF_VIDEOS:
            if getattr(self, name) is not None:
                self.features(name, videos)
        if self.lpips is not None:
            self.lpips_distance(videos, videos)

    def _need(self, name: str) -> Any:
        found = getattr(self, name)
        if found is None:
            raise ValueError(f"{name}: its weights are not at hand; put their safetensors in a folder {name}/.")
        return found


def clip_score(text_E: np.ndarray, images_TE: np.ndarray) -> float:
    """Mean over frames of 100 max(cos(text, image), 0), of CLIP's embeddings; 0 to 100.

    Hessel et al. 2021 (arXiv:2104.08718) define 2.5 max(cos, 0) of one image, with "A photo depicts" before the
    caption. Here is neither the 2.5 nor the prefix, but a hundredfold and, of a video, the mean over frames: a hundred
    times CLIPSIM (Wu et al. 2021, arXiv:2104.14806), but for the clipping. Compare only numbers of the same CLIP.

    Cannot see: time (frames in any order score the same), and little of counts, sides and which thing has which
    colour. A frame that shows the caption as letters scores high.
    """
    text, images = np.asarray(text_E, np.float64), np.asarray(images_TE, np.float64)
    cos_T = images @ text / (np.linalg.norm(images, axis=1) * np.linalg.norm(text))
    return float(100 * np.clip(cos_T, 0, None).mean())


def in_batches(function: Callable[..., Any], *arrays: np.ndarray, batch: int) -> np.ndarray:
    """``function`` of so many rows at once, the last batch filled up with its last row; the rows of all."""
    made = []
    for start in range(0, len(arrays[0]), batch):
        parts = [array[start : start + batch] for array in arrays]
        short = batch - len(parts[0])
        filled = [np.concatenate([part, np.repeat(part[-1:], short, axis=0)]) for part in parts]
        made.append(np.asarray(function(*filled))[: batch - short])
    return np.concatenate(made)


@functools.lru_cache(maxsize=4)
def _read(model: clip.CLIP) -> Callable[..., jax.Array]:
    return _exactly(lambda params, tokens: model.apply({"params": params}, tokens, method="read").embedding_BE)


@functools.lru_cache(maxsize=4)
def _look(model: clip.CLIP) -> Callable[..., jax.Array]:
    return _exactly(lambda params, images: model.apply({"params": params}, images, method="look").embedding_BE)


@functools.lru_cache(maxsize=4)
def _apply(model: Any) -> Callable[..., Any]:
    return _exactly(lambda params, *inputs: model.apply({"params": params}, *inputs))


def _exactly(function: Callable[..., Any]) -> Callable[..., Any]:
    """Jitted, with products in float32 where the device would take fewer digits."""

    def exact(*arguments: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return function(*arguments)

    return jax.jit(exact)
