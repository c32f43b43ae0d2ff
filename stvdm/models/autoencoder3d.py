# SPDX-License-Identifier: Apache-2.0
"""A causal 3-D autoencoder, from tiny to Wan 2.1's, whose streamed coding equals its whole coding.

Convolutions look back in time only, norms act on the channels of one position and attention within one frame, so a
latent frame depends on nothing after its group, and a stream has to remember at most two past inputs of each layer.
With ``grouping="causal"`` the first frame is coded alone (a clip of one frame is an image): the convolutions that
change the frame rate let it pass. With ``"uniform"`` all frames are coded in equal groups. With ``"frame"`` each frame
is coded alone, by the same layers with one tap in time: the 2-D control.

The defaults are Wan 2.1's (https://arxiv.org/abs/2503.20314, section 4.1), with 126.9 M parameters. Wan 2.2's, for the
5B model (4x16x16, 704.7 M), is `stvdm.interop.wan_autoencoder.WAN_2_2`.

    model = Autoencoder(width=32, multipliers=(1, 2), unshuffle=4, spatial_down=(True,), temporal_down=(True,))
    mean_Bthwz, log_variance_Bthwz = model.apply({"params": params}, video_BTHWC, method="encode")
    clips = list(stream_decode(model, params, mean_Bthwz, chunk_latents=2))
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from stvdm import shapes
from stvdm.models import tiling
from stvdm.models.causal_conv import CausalConv, RMSNorm, Triple
from stvdm.models.context_parallel import attend_unsplit
from stvdm.sharding import constrain

Cache = dict[str, Any]  # the last inputs of the time convolutions; {} before the first chunk
Statistics = dict[str, jax.Array]  # {"mean_z", "std_z"} of latents

# Between stages frames lie split by rows and columns; the compiler has neighbours exchange the borders that a
# convolution sees. Time is not split: two or three frames a device would be mostly border.
SPLIT = ("batch", None, "rows", "columns", None)


class Autoencoder(nn.Module):
    """Video in [-1, 1] to a Gaussian over latents, and back.

    The fields are the keys of ``config.model``. Stage i has ``width * multipliers[i]`` channels; between stages i and
    i + 1 space and time are halved where ``spatial_down[i]`` and ``temporal_down[i]`` say so (``temporal_down`` is not
    read with ``grouping="frame"``).
    """

    latent_channels: int = 16
    width: int = 96
    multipliers: Sequence[int] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    spatial_down: Sequence[bool] = (True, True, True)
    temporal_down: Sequence[bool] = (False, True, True)
    unshuffle: int = 1
    convolution: Literal["full", "separable"] = "full"
    grouping: Literal["causal", "uniform", "frame"] = "causal"
    shortcuts: bool = False  # past each stage that changes size: averages down, copies up (Wan 2.2, DC-AE)
    last_shortcut: bool = False  # with them: one past the encoder's last stage as well, which keeps its size (Wan 2.2)
    upsampling_halves: bool = True  # channels (Wan 2.1); if not, the next stage's first block changes them (Wan 2.2)
    decoder_width: int = 0  # what ``width`` is for the decoder; 0: the same
    middle_attention: bool = True
    video_channels: int = 3
    remat: Literal["nothing", "stages"] = "nothing"  # what the backward pass computes again
    dtype: Any = "float32"  # of products; parameters, norms and softmax stay float32

    @property
    def temporal(self) -> int:
        """Frames of video for one latent frame (but the first, in causal grouping)."""
        return 1 if self.grouping == "frame" else 2 ** sum(self.temporal_down)

    @property
    def spatial(self) -> int:
        """Pixels along height, and along width, for one latent position."""
        return self.unshuffle * 2 ** sum(self.spatial_down)

    def latent_shape(self, video: Triple, patch: Triple = (1, 1, 1)) -> Triple:
        """(t, h, w) of the latent of a video of (T, H, W); a ValueError names sizes that work, also of patches."""
        return shapes.latent_shape(
            video, temporal=self.temporal, spatial=self.spatial, grouping=self._grouping, patch=patch
        )

    def video_shape(self, latent: Triple) -> Triple:
        """(T, H, W) of the video that a latent of (t, h, w) decodes to."""
        return shapes.video_shape(latent, temporal=self.temporal, spatial=self.spatial, grouping=self._grouping)

    def setup(self) -> None:
        _check(self)
        style = Style(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Style)})
        widths = tuple(self.width * multiplier for multiplier in self.multipliers)
        widths_up = tuple((self.decoder_width or self.width) * multiplier for multiplier in self.multipliers[::-1])
        halves = tuple(
            (space, time and self.grouping != "frame")
            for space, time in zip(self.spatial_down, self.temporal_down, strict=True)
        )
        z, pixels = self.latent_channels, self.video_channels * self.unshuffle**2
        self.encoder = Encoder(2 * z, widths, halves, self.num_res_blocks, style)
        self.quant = CausalConv(2 * z, (1, 1, 1), bias_init=_narrow_posterior, dtype=self.dtype)
        self.post_quant = CausalConv(z, (1, 1, 1), dtype=self.dtype)
        self.decoder = Decoder(pixels, widths_up, halves[::-1], self.num_res_blocks + 1, style)

    def __call__(self, video_BTHWC: jax.Array) -> jax.Array:
        """The video decoded from the mean of its latent; `init` of this makes the parameters of both halves."""
        return self.decode(self.encode(video_BTHWC)[0])

    def encode(self, video_BTHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(mean_Bthwz, log_variance_Bthwz), float32, of a video in [-1, 1].

        Raises:
          ValueError: if the video does not divide into whole latents.
        """
        T, H, W = video_BTHWC.shape[1:4]
        if not self.variables.get("cache"):
            self.latent_shape((T, H, W))
        elif T % self.temporal:
            raise ValueError(
                f"num_frames={T}: a chunk after the first holds whole groups of frames, so use a multiple of "
                f"{self.temporal}."
            )
        x = self.quant(self.encoder(shapes.space_to_depth(video_BTHWC, self.unshuffle))).astype(jnp.float32)
        return x[..., : self.latent_channels], x[..., self.latent_channels :]

    def decode(self, latent_Bthwz: jax.Array) -> jax.Array:
        """video_BTHWC, float32, about [-1, 1]: not clipped, so that a loss sees how far out it lies."""
        x = self.decoder(self.post_quant(latent_Bthwz))
        return shapes.depth_to_space(x, self.unshuffle).astype(jnp.float32)

    @property
    def _grouping(self) -> shapes.Grouping:
        return "causal" if self.grouping == "causal" else "uniform"  # frame by frame is groups of one


# ---- streamed: the same numbers, a chunk at a time ------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="model")
def encode_chunk(
    model: Autoencoder, params: Any, chunk_BTHWC: jax.Array, cache: Cache
) -> tuple[jax.Array, jax.Array, Cache]:
    """(mean_Bthwz, log_variance_Bthwz, cache) of the next chunk of a video.

    The first chunk comes with ``cache={}`` and holds 1 + k ``temporal`` frames (causal) or k ``temporal`` (uniform);
    later ones hold k ``temporal``. Equal to whole coding up to the rounding of products, which depends on array sizes
    (below 1e-5 in float32). The cache is a tree of arrays.
    """
    variables = {"params": params, "cache": cache} if cache else {"params": params}
    (mean, log_variance), changed = model.apply(variables, chunk_BTHWC, method="encode", mutable=["cache"])
    return mean, log_variance, changed.get("cache", {})


@functools.partial(jax.jit, static_argnames="model")
def decode_chunk(model: Autoencoder, params: Any, chunk_Bthwz: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """(video_BTHWC, cache) of the next latent frames, any number of them; ``cache={}`` before the first."""
    variables = {"params": params, "cache": cache} if cache else {"params": params}
    video, changed = model.apply(variables, chunk_Bthwz, method="decode", mutable=["cache"])
    return video, changed.get("cache", {})


def stream_encode(
    model: Autoencoder, params: Any, video_BTHWC: jax.Array, *, chunk_latents: int | Sequence[int] = 1
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Yields (mean, log_variance) of the video chunk by chunk; together they equal `Autoencoder.encode`.

    ``chunk_latents`` is the number of latent frames of each chunk, or their list. Memory is that of one chunk.
    """
    T, H, W = video_BTHWC.shape[1:4]
    params = _on_devices(params)
    cache: Cache = {}
    for start, stop in _chunks(model.latent_shape((T, H, W))[0], chunk_latents):
        first, last = (model.video_shape((n, 1, 1))[0] if n else 0 for n in (start, stop))
        mean, log_variance, cache = encode_chunk(model, params, video_BTHWC[:, first:last], cache)
        yield mean, log_variance


def stream_decode(
    model: Autoencoder, params: Any, latent_Bthwz: jax.Array, *, chunk_latents: int | Sequence[int] = 1
) -> Iterator[jax.Array]:
    """Yields the video of a latent chunk by chunk; together they equal `Autoencoder.decode`."""
    params = _on_devices(params)
    cache: Cache = {}
    for start, stop in _chunks(latent_Bthwz.shape[1], chunk_latents):
        video, cache = decode_chunk(model, params, latent_Bthwz[:, start:stop], cache)
        yield video


def _on_devices(params: Any) -> Any:
    """Weights that lie on the host go over once, not with every chunk; arrays, some of them on other hosts, stay."""
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf), params)


# ---- tiled: a large frame in pieces ---------------------------------------------------------------------------------


def tiled_encode(
    model: Autoencoder,
    params: Any,
    video_BTHWC: jax.Array,
    *,
    tile: tuple[int, int] = (32, 32),
    overlap: int = 8,
    margin: int = 0,
    chunk_latents: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`Autoencoder.encode` of overlapping tiles, blended linearly: (mean_Bthwz, log_variance_Bthwz).

    ``tile``, ``overlap`` and ``margin`` count latent positions. ``margin`` positions along the inner borders of a
    tile, where convolutions saw padding in place of neighbours, are thrown away before blending. The result equals
    whole coding where there is no middle attention and the margin is as wide as the receptive field, and always where
    one tile holds the frame; elsewhere it is near. With ``chunk_latents`` each tile is streamed as well.
    For callers whose frames are too large for memory: `Pipeline` streams whole ones.
    """
    s = model.spatial

    def encode(y: int, x: int, h: int, w: int) -> jax.Array:
        part = video_BTHWC[:, :, y * s : (y + h) * s, x * s : (x + w) * s]
        chunks = stream_encode(model, params, part, chunk_latents=chunk_latents or part.shape[1])
        return jnp.concatenate([jnp.concatenate(moments, axis=-1) for moments in chunks], axis=1)

    T, H, W = video_BTHWC.shape[1:4]
    size = model.latent_shape((T, H, W))[1:]
    moments = tiling.blend(encode, size, tile=tile, overlap=overlap, margin=margin, scale=1)
    return moments[..., : model.latent_channels], moments[..., model.latent_channels :]


def tiled_decode(
    model: Autoencoder,
    params: Any,
    latent_Bthwz: jax.Array,
    *,
    tile: tuple[int, int] = (32, 32),
    overlap: int = 8,
    margin: int = 0,
    chunk_latents: int | None = None,
) -> jax.Array:
    """`Autoencoder.decode` of overlapping tiles of the latent, blended linearly; for callers, as `tiled_encode`."""

    def decode(y: int, x: int, h: int, w: int) -> jax.Array:
        part = latent_Bthwz[:, :, y : y + h, x : x + w]
        return jnp.concatenate(
            list(stream_decode(model, params, part, chunk_latents=chunk_latents or part.shape[1])), axis=1
        )

    size = (latent_Bthwz.shape[2], latent_Bthwz.shape[3])
    return tiling.blend(decode, size, tile=tile, overlap=overlap, margin=margin, scale=model.spatial)


# ---- the scale of latents -------------------------------------------------------------------------------------------


def latent_statistics(latents: Iterable[Any]) -> dict[str, np.ndarray]:
    """{"mean_z", "std_z"}, float32: per-channel mean and deviation over all positions of all batches (..., z).

    Batches are merged in float64 (Chan, Golub, LeVeque 1979), so that they may be many and of several sizes.
    """
    count, mean, squares = 0, np.zeros(()), np.zeros(())
    for batch in latents:
        values = np.asarray(batch, np.float64).reshape(-1, np.shape(batch)[-1])
        n, step = len(values), values.mean(0) - mean
        squares = squares + values.var(0) * n + step**2 * count * n / (count + n)
        mean, count = mean + step * n / (count + n), count + n
    if not count:
        raise ValueError("latents=(): statistics need at least one batch.")
    return {"mean_z": np.asarray(mean, np.float32), "std_z": np.asarray(np.sqrt(squares / count), np.float32)}


def normalise(latent_Bthwz: jax.Array, statistics: Statistics) -> jax.Array:
    """Latents as the diffusion model sees them: each channel with mean 0 and deviation 1."""
    return (latent_Bthwz - statistics["mean_z"]) / statistics["std_z"]


def denormalise(latent_Bthwz: jax.Array, statistics: Statistics) -> jax.Array:
    """Latents as the decoder expects them: the inverse of `normalise`."""
    return latent_Bthwz * statistics["std_z"] + statistics["mean_z"]


def sample_latent(key: jax.Array, mean_Bthwz: jax.Array, log_variance_Bthwz: jax.Array) -> jax.Array:
    """One draw of the posterior, differentiable in its moments."""
    deviation = jnp.exp(0.5 * jnp.clip(log_variance_Bthwz, -30.0, 20.0))
    return mean_Bthwz + deviation * jax.random.normal(key, mean_Bthwz.shape, mean_Bthwz.dtype)


def kl(mean_Bthwz: jax.Array, log_variance_Bthwz: jax.Array) -> jax.Array:
    """KL(N(mean, variance) | N(0, 1)) in nats, averaged over latent values."""
    log_variance = jnp.clip(log_variance_Bthwz, -30.0, 20.0)
    return 0.5 * jnp.mean(jnp.square(mean_Bthwz) + jnp.exp(log_variance) - 1.0 - log_variance)


# ---- the layers -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Style:
    """What all layers of one autoencoder share."""

    convolution: str
    grouping: str
    shortcuts: bool
    last_shortcut: bool
    upsampling_halves: bool
    middle_attention: bool
    remat: str
    dtype: Any

    @property
    def kernels(self) -> tuple[Triple, Triple]:
        """Of the two convolutions of a residual block; the first is also that of the ends of the network."""
        taps = 1 if self.grouping == "frame" else 3
        return ((taps, 3, 3), (taps, 3, 3)) if self.convolution == "full" else ((1, 3, 3), (taps, 1, 1))

    def stage(self, module: type[nn.Module]) -> Any:
        """The module, computed again in the backward pass if so wished."""
        return nn.remat(module) if self.remat == "stages" else module


class Encoder(nn.Module):
    features: int
    widths: tuple[int, ...]
    halves: tuple[tuple[bool, bool], ...]  # (space, time) between stages
    num_blocks: int
    style: Style

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        style, edge = self.style, self.style.kernels[0]
        x = CausalConv(self.widths[0], edge, dtype=style.dtype, name="conv_in")(x)
        for i, (width, half) in enumerate(itertools.zip_longest(self.widths, self.halves, fillvalue=(False, False))):
            x = constrain(x, *SPLIT)
            last = i == len(self.widths) - 1
            shortcut = style.shortcuts and (any(half) or (last and style.last_shortcut))
            x = style.stage(DownStage)(width, self.num_blocks, *half, shortcut, style, name=f"stage_{i}")(x)
        x = style.stage(Middle)(style, name="middle")(x)
        x = nn.silu(RMSNorm(name="norm_out")(x))
        return CausalConv(self.features, edge, dtype=style.dtype, name="conv_out")(x)


class Decoder(nn.Module):
    features: int
    widths: tuple[int, ...]
    doubles: tuple[tuple[bool, bool], ...]  # (space, time) between stages
    num_blocks: int
    style: Style

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        style, edge = self.style, self.style.kernels[0]
        x = CausalConv(self.widths[0], edge, dtype=style.dtype, name="conv_in")(x)
        x = style.stage(Middle)(style, name="middle")(x)
        for i, (width, double) in enumerate(itertools.zip_longest(self.widths, self.doubles, fillvalue=(False, False))):
            x = constrain(x, *SPLIT)
            shortcut = style.shortcuts and any(double)
            x = style.stage(UpStage)(width, self.num_blocks, *double, shortcut, style, name=f"stage_{i}")(x)
        x = nn.silu(RMSNorm(name="norm_out")(x))
        return CausalConv(self.features, edge, dtype=style.dtype, name="conv_out")(x)


class DownStage(nn.Module):
    """Residual blocks; then space is halved (stride 2, padded right and below), then time.

    A latent of time k sees inputs 2k - 2, 2k - 1, 2k (causal; input 0 passes as it is) or 2k - 1, 2k, 2k + 1 (uniform).
    """

    width: int
    num_blocks: int
    space: bool
    time: bool
    shortcut: bool
    style: Style

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        entered = x
        for i in range(self.num_blocks):
            x = ResidualBlock(self.width, self.style, name=f"block_{i}")(x)
        if self.space:
            x = CausalConv(self.width, (1, 3, 3), stride=(1, 2, 2), dtype=self.style.dtype, name="space")(x)
        if self.time:
            conv = CausalConv(self.width, (3, 1, 1), stride=(2, 1, 1), dtype=self.style.dtype, name="time")
            if self.style.grouping == "causal" and not conv.has_past():
                x = jnp.concatenate([x[:, :1], conv(x[:, 1:], past=x[:, :1])], axis=1)
            else:
                x = conv(x)
        if self.shortcut:
            x += _gather(entered, self.width, 1 + self.time, 1 + self.space)
        return x


class UpStage(nn.Module):
    """Residual blocks; then time is doubled, then space (nearest neighbour, convolution, to half the channels or all).

    A convolution to twice the channels gives two frames for one. In causal grouping frame 0 passes as it is, and the
    convolution, which never sees it, has zeros in its place (Wan's rule).
    """

    width: int
    num_blocks: int
    space: bool
    time: bool
    shortcut: bool
    style: Style

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        entered, first_alone = x, False
        for i in range(self.num_blocks):
            x = ResidualBlock(self.width, self.style, name=f"block_{i}")(x)
        if self.time:
            conv = CausalConv(2 * self.width, (3, 1, 1), dtype=self.style.dtype, name="time")
            first_alone = self.style.grouping == "causal" and not conv.has_past()
            if first_alone:
                x = jnp.concatenate([x[:, :1], _unfold_time(conv(x[:, 1:]))], axis=1)
            else:
                x = _unfold_time(conv(x))
        if self.space:
            x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
            width = self.width // 2 if self.style.upsampling_halves else self.width
            x = CausalConv(width, (1, 3, 3), dtype=self.style.dtype, name="space")(x)
        if self.shortcut:
            x += _spread(entered, x.shape[-1], 1 + self.time, 1 + self.space)[:, int(first_alone) :]
        return x


class Middle(nn.Module):
    """Two residual blocks, attention within each frame between them."""

    style: Style

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = ResidualBlock(x.shape[-1], self.style, name="block_0")(x)
        if self.style.middle_attention:
            x = FrameAttention(self.style, name="attention")(x)
        return ResidualBlock(x.shape[-1], self.style, name="block_1")(x)


class ResidualBlock(nn.Module):
    width: int
    style: Style

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        (first, second), dtype = self.style.kernels, self.style.dtype
        y = nn.silu(RMSNorm(name="norm_0")(x))
        y = CausalConv(self.width, first, dtype=dtype, name="conv_0")(y)
        y = nn.silu(RMSNorm(name="norm_1")(y))
        y = CausalConv(self.width, second, dtype=dtype, zero=True, name="conv_1")(y)
        if x.shape[-1] != self.width:
            x = CausalConv(self.width, (1, 1, 1), dtype=dtype, name="shortcut")(x)
        return x + y


class FrameAttention(nn.Module):
    """One head over the positions of each frame."""

    style: Style

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array) -> jax.Array:
        B, T, H, W, C = x_BTHWC.shape
        y = CausalConv(3 * C, (1, 1, 1), dtype=self.style.dtype, name="qkv")(RMSNorm(name="norm")(x_BTHWC))
        q, k, v = jnp.split(y.reshape(B * T, H * W, 1, 3 * C), 3, axis=-1)
        y = attend_unsplit(q, k, v).reshape(B, T, H, W, C)
        return x_BTHWC + CausalConv(C, (1, 1, 1), dtype=self.style.dtype, zero=True, name="out")(y)


def _narrow_posterior(key: jax.Array, shape: tuple[int], dtype: Any = jnp.float32) -> jax.Array:
    """Biases of (mean, log variance) that start as (0, -6): with deviation 1 noise would drown the first means."""
    return jnp.zeros(shape, dtype).at[shape[0] // 2 :].set(-6.0)


def _unfold_time(x: jax.Array) -> jax.Array:
    """(B, T, H, W, 2 C) to (B, 2 T, H, W, C): the first half of the channels comes first in time."""
    B, T, H, W, C = x.shape
    return x.reshape(B, T, H, W, 2, C // 2).transpose(0, 1, 4, 2, 3, 5).reshape(B, 2 * T, H, W, C // 2)


def _gather(x: jax.Array, width: int, time: int, space: int) -> jax.Array:
    """A shortcut past a downsampling: what a new position gathers, averaged into ``width`` channels.

    An odd frame out is the first of a clip, which stands alone: zeros fill its group.
    """
    x = jnp.pad(x, ((0, 0), (x.shape[1] % time, 0), (0, 0), (0, 0), (0, 0)))
    B, T, H, W, C = x.shape
    _divides(width, C * time * space**2)
    cut = x.reshape(B, T // time, time, H // space, space, W // space, space, C).transpose(0, 1, 3, 5, 7, 2, 4, 6)
    return cut.reshape(*cut.shape[:4], width, -1).mean(axis=-1)


def _spread(x: jax.Array, width: int, time: int, space: int) -> jax.Array:
    """A shortcut past an upsampling: channels repeated until they fill ``width`` at every new position."""
    B, T, H, W, C = x.shape
    _divides(C, width * time * space**2)
    x = jnp.repeat(x, width * time * space**2 // C, axis=-1).reshape(B, T, H, W, width, time, space, space)
    return x.transpose(0, 1, 5, 2, 6, 3, 7, 4).reshape(B, T * time, H * space, W * space, width)


def _divides(width: int, gathered: int) -> None:
    if gathered % width:
        raise ValueError(
            f"shortcuts=True: {gathered} channels can't be shared out equally among {width}, so use multipliers that "
            "are powers of 2."
        )


def _chunks(total: int, sizes: int | Sequence[int]) -> Iterator[tuple[int, int]]:
    """(start, stop) of chunks of these sizes (or of one size, the last perhaps smaller)."""
    if isinstance(sizes, int):
        if sizes < 1:
            raise ValueError(f"chunk_latents={sizes}: expected at least 1.")
        sizes = [min(sizes, total - start) for start in range(0, total, sizes)]
    if sum(sizes) != total or min(sizes) < 1:
        raise ValueError(f"chunk_latents={tuple(sizes)}: expected sizes of at least 1 that add up to {total} latents.")
    return itertools.pairwise(itertools.accumulate(sizes, initial=0))


def _check(model: Autoencoder) -> None:
    between = len(model.multipliers) - 1
    for name in ("spatial_down", "temporal_down"):
        if len(getattr(model, name)) != between:
            raise ValueError(
                f"{name}={tuple(getattr(model, name))}: expected {between} entries, one between any two of the "
                f"{between + 1} stages of multipliers={tuple(model.multipliers)}."
            )
    for name, options in (
        ("convolution", ("full", "separable")),
        ("grouping", ("causal", "uniform", "frame")),
        ("remat", ("nothing", "stages")),
    ):
        if getattr(model, name) not in options:
            raise ValueError(f"{name}={getattr(model, name)!r}: expected one of {options}.")
    width = model.decoder_width or model.width
    odd = any(width * m % 2 for m, down in zip(model.multipliers[1:], model.spatial_down, strict=True) if down)
    if odd and model.upsampling_halves:
        raise ValueError(f"width={width}: upsampling halves channels, so use an even width.")
