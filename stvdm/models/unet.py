# SPDX-License-Identifier: Apache-2.0
"""An image U-Net on latents, and the layers over time that turn it into one for video: what the DiT is held against.

    space    convolutions under the noise level, attention within the frame, to the text, an MLP;   each frame alone
    time     attention along time, an MLP;   each place alone, and nothing at first, switched on by training

The spatial part is the U-Net of latent diffusion (arXiv:2112.10752): a level for each halving of height and width,
with twice the channels of the one before, and shortcuts from the way down to the way up. With ``temporal``, layers
over time follow each spatial block (Video LDM, arXiv:2304.08818; AnimateDiff, arXiv:2307.04725). Trained first without
them, then nothing but them (``start_from``, ``train_only="temporal"``), it is an image model with time bolted on.

    unet = UNet(latent_channels=8, text_width=96, width=48, patch=(1, 2, 2))
    velocity_Bthwz = unet.apply({"params": params}, latent_Bthwz, time_BK, None, text_BSE, text_mask_BS)

It is called as `models.dit.DiT` is, starts as zero like it, and knows one noise level a clip.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from stvdm.models import embeddings
from stvdm.models.attention import attention, cross_attention
from stvdm.models.block import Attention, layer_norm
from stvdm.models.causal_conv import CausalConv
from stvdm.models.linear import linear, zeros
from stvdm.models.patterns import Size3
from stvdm.sharding import constrain, partitioned

REMAT = ("nothing", "everything")  # what the backward pass computes again: of a block, all but its input
GROUPS = 8  # of channels, that are normalised together


class UNet(nn.Module):
    """A U-Net of images, or with ``temporal`` of clips; see the module's docstring, and ``config.unet``."""

    latent_channels: int
    text_width: int
    width: int  # channels of the finest level; each coarser one has twice as many
    num_heads: int
    patch: Size3 = (1, 4, 4)  # latent positions in one of the coarsest level
    num_blocks: int = 1  # in each level on the way down; on the way up there is one more
    temporal: bool = True
    time_features: int = 256
    remat: str = "nothing"
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        latent_Bthwz: jax.Array,
        time_BK: jax.Array,
        level_BN: jax.Array | None,
        text_BSE: jax.Array,
        text_mask_BS: jax.Array | None = None,
    ) -> jax.Array:
        """Predicts the velocity of a noisy latent: velocity_Bthwz in float32.

        Args:
          latent_Bthwz: noisy latent; t is any, h and w are multiples of the patch's.
          time_BK: the noise level of each clip, in [0, 1]; K is 1.
          level_BN: None.
          text_BSE, text_mask_BS: text features, and where they are real.

        Raises:
          ValueError: if a field or a shape does not fit, or a clip has several noise levels.
        """
        halvings = self._check(latent_Bthwz, time_BK, level_BN)
        features_BC = embeddings.time_features(time_BK[:, 0], self.time_features)
        time_BF = nn.silu(linear(4 * self.width, None, "mlp", name="time_in")(features_BC))
        time_BF = nn.silu(linear(4 * self.width, "mlp", None, name="time_out")(time_BF))
        text_BSE = text_BSE.astype(self.dtype)

        def stage(x: jax.Array, level: int, name: str) -> jax.Array:
            x = self._module(SpatialBlock)(self.width * 2**level, self.num_heads, self.dtype, name=f"{name}_space")(
                x, time_BF, text_BSE, text_mask_BS
            )
            if self.temporal:
                x = self._module(TemporalBlock)(self.num_heads, self.dtype, name=f"{name}_temporal")(x)
            return constrain(x, "batch", None, None, None, None)

        x = CausalConv(self.width, (1, 3, 3), dtype=self.dtype, name="conv_in")(latent_Bthwz)
        passed = [x]
        for level in range(halvings + 1):
            if level:
                down = CausalConv(
                    self.width * 2**level, (1, 3, 3), stride=(1, 2, 2), dtype=self.dtype, name=f"down_{level}"
                )
                x = down(x)
                passed.append(x)
            for i in range(self.num_blocks):
                x = stage(x, level, f"down_{level}_{i}")
                passed.append(x)
        x = stage(x, halvings, "middle")
        for level in reversed(range(halvings + 1)):
            for i in range(self.num_blocks + 1):
                x = stage(jnp.concatenate([x, passed.pop()], axis=-1), level, f"up_{level}_{i}")
            if level:
                x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
                x = CausalConv(self.width * 2 ** (level - 1), (1, 3, 3), dtype=self.dtype, name=f"up_{level}")(x)
        assert not passed
        x = nn.silu(_group_norm("norm_out")(x))
        return CausalConv(self.latent_channels, (1, 3, 3), zero=True, dtype=self.dtype, name="conv_out")(x).astype(
            jnp.float32
        )

    def _module(self, module: type[nn.Module]) -> Any:
        return nn.remat(module) if self.remat == "everything" else module

    def _check(self, latent_Bthwz: jax.Array, time_BK: jax.Array, level_BN: jax.Array | None) -> int:
        """How often space is halved."""
        pt, ph, pw = self.patch
        halvings = ph.bit_length() - 1
        if pt != 1 or ph != pw or ph != 2**halvings:
            raise ValueError(
                f"patch={tuple(self.patch)}: a U-Net halves height and width alike, so use (1, 2**n, 2**n)."
            )
        if self.remat not in REMAT:
            raise ValueError(f"remat={self.remat!r}: expected one of {', '.join(REMAT)}.")
        for name, divisor in (("num_heads", 2 * self.num_heads), ("groups of a norm", GROUPS)):
            if self.width % divisor:
                raise ValueError(f"width={self.width}: use a multiple of {divisor}, for {name}.")
        if latent_Bthwz.ndim != 5 or latent_Bthwz.shape[-1] != self.latent_channels:
            raise ValueError(
                f"latent of shape {latent_Bthwz.shape}: expected (B, t, h, w, latent_channels={self.latent_channels})."
            )
        h, w = latent_Bthwz.shape[2:4]
        if h % ph or w % pw:
            raise ValueError(f"latent of {h}x{w}: expected multiples of {ph}x{pw}, as it is halved {halvings} times.")
        if level_BN is not None or time_BK.shape[1] != 1:
            raise ValueError(
                f"time of shape {time_BK.shape}: a U-Net knows one noise level a clip, (B, 1) and no level_BN; for "
                "one a token use a DiT."
            )
        return halvings


class SpatialBlock(nn.Module):
    """Each frame alone: two convolutions under the noise level, attention in the frame and to the text, an MLP."""

    features: int
    num_heads: int
    dtype: jax.typing.DTypeLike

    @nn.compact
    def __call__(
        self, x_BthwC: jax.Array, time_BF: jax.Array, text_BSE: jax.Array, text_mask_BS: jax.Array | None
    ) -> jax.Array:
        x = x_BthwC
        conv = functools.partial(CausalConv, self.features, dtype=self.dtype)
        y = conv((1, 3, 3), name="conv_1")(nn.silu(_group_norm("norm_1")(x)))
        scale_shift = linear(2 * self.features, None, "mlp", name="time")(time_BF)[:, None, None, None]
        scale, shift = jnp.split(scale_shift, 2, axis=-1)
        y = nn.silu(_group_norm("norm_2")(y) * (1 + scale) + shift)
        y = conv((1, 3, 3), zero=True, name="conv_2")(y)
        if x.shape[-1] != self.features:
            x = conv((1, 1, 1), name="shortcut")(x)
        x = x + y

        grid = (x.shape[1], x.shape[2], x.shape[3])
        tokens_BND = x.reshape(x.shape[0], math.prod(grid), self.features)
        place = embeddings.sincos_places(embeddings.grid_places(grid, scale=(0.0, 1.0, 1.0)), self.features)
        attend = functools.partial(attention, grid=grid, pattern="frame")
        read = functools.partial(cross_attention, mask_BS=text_mask_BS)
        layer = functools.partial(
            Attention, self.features, self.num_heads, qk_norm=True, out_init=zeros, dtype=self.dtype
        )
        y = _layer_norm("self_norm", self.dtype)(tokens_BND) + place.astype(self.dtype)
        tokens_BND += layer(name="self_attention")(attend, y)
        y = _layer_norm("cross_norm", self.dtype)(tokens_BND)
        tokens_BND += layer(name="cross_attention")(read, y, text_BSE)
        return _mlp(tokens_BND, self.dtype).reshape(x.shape)


class TemporalBlock(nn.Module):
    """Each place alone: attention along time, and an MLP. Both begin as nothing."""

    num_heads: int
    dtype: jax.typing.DTypeLike

    @nn.compact
    def __call__(self, x_BthwC: jax.Array) -> jax.Array:
        B, t, h, w, C = x_BthwC.shape
        tokens_BND = x_BthwC.reshape(B, t * h * w, C)
        place = embeddings.sincos_places(embeddings.grid_places((t, h, w))[:, :1], C)
        y = _layer_norm("self_norm", self.dtype)(tokens_BND) + place.astype(self.dtype)
        attend = functools.partial(attention, grid=(t, h, w), pattern="time")
        layer = Attention(C, self.num_heads, qk_norm=True, out_init=zeros, dtype=self.dtype, name="self_attention")
        return _mlp(tokens_BND + layer(attend, y), self.dtype).reshape(x_BthwC.shape)


def _mlp(tokens_BND: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """x + W2 gelu(W1 LayerNorm(x)), W2 zero at the start; to be called in a module's compact method."""
    D = tokens_BND.shape[-1]
    y_BND = _layer_norm("mlp_norm", dtype)(tokens_BND)
    y_BNF = nn.gelu(linear(4 * D, "width", "mlp", dtype=dtype, name="mlp_in")(y_BND))
    return tokens_BND + linear(D, "mlp", "width", init=zeros, dtype=dtype, name="mlp_out")(y_BNF)


def _layer_norm(name: str, dtype: jax.typing.DTypeLike) -> Callable[[jax.Array], jax.Array]:
    norm = layer_norm(name)
    return lambda x: norm(x).astype(dtype)


def _group_norm(name: str) -> nn.GroupNorm:
    """Of each frame alone, in float32."""
    return nn.GroupNorm(
        num_groups=GROUPS,
        reduction_axes=(-3, -2, -1),
        dtype=jnp.float32,
        scale_init=partitioned(nn.initializers.ones, "channels"),
        bias_init=partitioned(zeros, "channels"),
        name=name,
    )
