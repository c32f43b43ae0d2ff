# SPDX-License-Identifier: Apache-2.0
"""A small network of clips whose features stand in for I3D's where no weights can be had: it is trained on kinetic
shapes to tell what a clip shows and what was done to it (`stvdm.train.features`), and lies in the package.

    space-to-depth -> stages of (3x3 in space, all but the first halving it; 3 in time, halving it between stages) ->
    mean and largest over space and time -> D features -> heads

What is normalised is a clip as a whole: by position or by frame it would lose what flickers, fades or is blurred.

    net = video_features.bundled()
    real_ND, made_MD = net.extract(real), net.extract(made)       # uint8 (N, T, H, W, 3), any T, H, W
    frechet_distance(real_ND, made_MD)                            # stvdm.evaluation.distributions

A Frechet distance over these features is a *kinetic* Frechet distance: never FVD, and comparable with nothing but
itself over the same features. It cannot see what is smaller than a pixel at 32x32, to which clips are brought, and
little of what no head asks about (`stvdm/bundled/README.md`).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from stvdm import checkpoint, shapes
from stvdm.models.causal_conv import CausalConv
from stvdm.models.linear import linear

SIZE = 32  # pixels along height and width that clips are brought to


class VideoFeatures(nn.Module):
    """Clips in [-1, 1] to features_BD, float32."""

    features: int = 64  # D: well below the number of clips in an evaluation, else covariances are singular
    widths: Sequence[int] = (32, 64, 96)

    @nn.compact
    def __call__(self, video_BTHWC: jax.Array) -> jax.Array:
        x = shapes.space_to_depth(video_BTHWC, 2)
        for i, width in enumerate(self.widths):
            stride = 2 if i else 1
            x = CausalConv(width, (1, 3, 3), stride=(1, stride, stride), name=f"space_{i}")(x)
            for j in range(2):
                y = nn.silu(ClipNorm(name=f"norm_{i}{j}")(x))
                x = x + CausalConv(width, (3, 1, 1), name=f"time_{i}{j}")(y)
            x = nn.silu(ClipNorm(name=f"norm_{i}")(x))
            if i + 1 < len(self.widths):
                x = _halved(x)
        pooled = jnp.concatenate([x.mean((1, 2, 3)), x.max((1, 2, 3))], axis=-1)
        return linear(self.features, None, None, name="features")(pooled)


class ClipNorm(nn.Module):
    """x / rms(x) * gamma + beta: one root mean square for a clip, a gamma and a beta for each channel."""

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array) -> jax.Array:
        gamma = self.param("gamma", nn.initializers.ones, x_BTHWC.shape[-1:])
        beta = self.param("beta", nn.initializers.zeros, x_BTHWC.shape[-1:])
        mean_square_B = jnp.square(x_BTHWC).mean((1, 2, 3, 4), keepdims=True)
        return x_BTHWC * jax.lax.rsqrt(mean_square_B + 1e-6) * gamma + beta


class Heads(nn.Module):
    """What the features are trained to tell: one linear layer of them, in parts."""

    parts: tuple[tuple[str, int], ...]  # name -> values

    @nn.compact
    def __call__(self, features_BD: jax.Array) -> dict[str, jax.Array]:
        """Name -> (B, values)."""
        hidden = nn.silu(linear(4 * features_BD.shape[-1], None, None, name="hidden")(features_BD))
        values = linear(sum(size for _, size in self.parts), None, None, name="values")(hidden)
        ends = np.cumsum([size for _, size in self.parts])[:-1]
        return dict(zip([name for name, _ in self.parts], jnp.split(values, ends, axis=-1), strict=True))


@dataclasses.dataclass(frozen=True)
class FeatureNet:
    """A trained network: its modules, their weights, and the mean and deviation of features of real clips."""

    net: VideoFeatures
    heads: Heads
    params: Any
    digest: str

    def extract(self, videos: np.ndarray, *, batch: int = 32) -> np.ndarray:
        """Features (N, D) of uint8 videos (N, T, H, W, 3), float64; of real kinetic shapes of mean 0 and deviation 1.

        Raises:
          ValueError: for videos that are not bytes of three channels.
        """
        found = [self._batch(videos[start : start + batch], batch)[0] for start in range(0, len(videos), batch)]
        return np.concatenate(found).astype(np.float64)

    def tell(self, videos: np.ndarray, *, batch: int = 32) -> dict[str, np.ndarray]:
        """What the heads say of videos: name -> (N, values), logits."""
        found = [self._batch(videos[start : start + batch], batch)[1] for start in range(0, len(videos), batch)]
        return {name: np.concatenate([part[name] for part in found]) for name, _ in self.heads.parts}

    def _batch(self, videos: np.ndarray, size: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        if videos.dtype != np.uint8 or videos.ndim != 5 or videos.shape[-1] != 3:
            raise ValueError(
                f"videos of shape {videos.shape} and type {videos.dtype}: expected bytes, "
                "(clips, frames, height, width, 3)."
            )
        filled = np.concatenate([videos, np.repeat(videos[-1:], size - len(videos), axis=0)])
        features, said = _apply(self.net, self.heads, self.params, filled)
        return np.asarray(features)[: len(videos)], {k: np.asarray(v)[: len(videos)] for k, v in said.items()}


def load(folder: epath.PathLike) -> FeatureNet:
    """A network that `stvdm.train.features` wrote."""
    params, about = checkpoint.load_model(folder)
    net = VideoFeatures(about["net"]["features"], tuple(about["net"]["widths"]))
    heads = Heads(tuple((name, size) for name, size in about["heads"]))
    return FeatureNet(net, heads, params, about["sha256"])


@functools.lru_cache(maxsize=1)
def bundled() -> FeatureNet:
    """The network in the package."""
    with importlib.resources.as_file(importlib.resources.files("stvdm") / "bundled" / "features") as folder:
        return load(folder)


def prepare(video_BTHWC: jax.Array) -> jax.Array:
    """Bytes to [-1, 1] at `SIZE` x `SIZE`: averaged where they are larger, interpolated where smaller."""
    B, T, H, W, C = video_BTHWC.shape
    x = video_BTHWC.astype(jnp.float32) / 127.5 - 1
    if {H, W} != {SIZE}:
        x = jax.image.resize(x, (B, T, SIZE, SIZE, C), "linear", antialias=True)
    return x


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(net: VideoFeatures, heads: Heads, params: Any, videos: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    with jax.default_matmul_precision("highest"):
        raw = net.apply({"params": params["net"]}, prepare(videos))
        known = params["statistics"]
        return (raw - known["mean"]) / known["std"], heads.apply({"params": params["heads"]}, raw)


def _halved(x: jax.Array) -> jax.Array:
    """Means of frames by twos; of an odd number, the first stands alone."""
    if x.shape[1] % 2:
        x = jnp.concatenate([x[:, :1], x], axis=1)
    return (x[:, ::2] + x[:, 1::2]) / 2
