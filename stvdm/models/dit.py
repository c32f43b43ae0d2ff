# SPDX-License-Identifier: Apache-2.0
"""The spacetime diffusion transformer: a noisy latent, its noise levels and a text go in, the velocity comes out.

A latent is cut into spacetime patches, one token each, which pass through blocks of

    x = x + gate_1 * SelfAttention(modulate(LayerNorm(x), shift_1, scale_1))
    x = x +          CrossAttention(LayerNorm(x), text)                            where text_path="cross"
    x = x + gate_2 * MLP(modulate(LayerNorm(x), shift_2, scale_2))                 modulate(y, a, b) = y (1 + b) + a

Shifts, scales and gates come from the noise level: one time MLP shared by all blocks, plus a table of each
block's own. It is DiT (arXiv:2212.09748) in the form of Wan 2.1 (arXiv:2503.20314), so that the largest open
models are a config of this file.

    dit = DiT(latent_channels=16, text_width=128, **SIZES["S"])
    params = dit.init(key, latent_Bthwz, time_BK, None, text_BSE, text_mask_BS)["params"]
    velocity_Bthwz = dit.apply({"params": params}, latent_Bthwz, time_BK, level_BN, text_BSE, text_mask_BS)

**Starts as nothing.** Gates start at zero (time MLP's last layer and the tables), and so do the output layers of
cross-attention and of the head: a fresh block is the identity, a fresh model predicts zeros (adaLN-Zero). Wan draws
its tables at random; loaded weights don't care.

**Time per token.** A clip has few distinct noise levels (what is known, what is being made; one per latent frame
when frames run ahead of each other): time_BK holds those K, level_BN says which one a token has. Modulation is
computed for K levels and selected inside the block, so a [B, N, 6D] array never exists.

**Text, jointly.** With text_path="joint" the text tokens join the sequence and pass through the same weights, with
a modulation table of their own, at the noisiest level of their clip (what is known has no say in it). They
have no place, hence no rotary turn, and are dropped at the end. What they may see is `attention.joint_attention`'s.

**Precision.** Parameters, norms, softmax, modulation and time are float32. Products and the tokens between blocks
(the residual stream) are in ``dtype``.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from stvdm import shapes
from stvdm.models import embeddings
from stvdm.models.attention import attention, cross_attention, joint_attention
from stvdm.models.linear import linear, xavier, zeros
from stvdm.models.patterns import Size3, check_kind
from stvdm.sharding import constrain, partitioned

SIZES: dict[str, dict[str, int]] = {  # D, layers, A, F                                     parameters
    "tiny": dict(width=192, num_layers=6, num_heads=6, mlp_width=768),
    "S": dict(width=384, num_layers=12, num_heads=6, mlp_width=1536),
    "B": dict(width=768, num_layers=12, num_heads=12, mlp_width=3072),
    "L": dict(width=1024, num_layers=24, num_heads=16, mlp_width=4096),
    "XL": dict(width=1152, num_layers=28, num_heads=16, mlp_width=4608),
    "wan-1.3b": dict(width=1536, num_layers=30, num_heads=12, mlp_width=8960),
    "wan-5b": dict(width=3072, num_layers=30, num_heads=24, mlp_width=14336),
    "wan-14b": dict(width=5120, num_layers=40, num_heads=40, mlp_width=13824),
}

_policies = jax.checkpoint_policies
REMAT: dict[str, Callable[..., Any] | None] = {  # what a block's backward pass computes again
    "nothing": None,  # every intermediate is kept: fastest, most memory
    "projections": _policies.dots_with_no_batch_dims_saveable,  # all but products with weights: cheap to redo
    "attention": _policies.save_only_these_names("attention"),  # all but what self-attention gave, the cost at large N
    "offload": _policies.save_and_offload_only_these_names(  # as "attention", but that waits in the host's memory
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["attention"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "everything": _policies.nothing_saveable,  # the whole block, from its input: least memory, a third more work
}

EPSILON = 1e-6


class Conditions(NamedTuple):
    """What every block is told beside its tokens."""

    modulation_BK6D: jax.Array  # float32; the time MLP's word on each noise level
    level_BN: jax.Array | None  # which of the K levels a token has; None: all have the first
    text_BSD: jax.Array | None  # for cross-attention
    text_mask_BS: jax.Array | None
    turns: embeddings.Turns | None  # rotary turns of the video tokens


class DiT(nn.Module):
    """A spacetime diffusion transformer; see the module's docstring, and ``config.dit`` for every field."""

    latent_channels: int
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    text_width: int
    extra_channels: int = 0  # conditioning latents and masks that the caller appends to the latent's channels
    patch: Size3 = (1, 2, 2)
    attention: tuple[str, ...] = ("full",)  # cycled over the layers; factorised is ("frame", "time")
    window: Size3 | None = None
    text_path: str = "cross"
    time_features: int = 256
    positions: str = "rotary"
    rope_theta: float = 1e4
    qk_norm: bool = True
    remat: str = "nothing"
    scan_layers: bool = True
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        latent_Bthwz: jax.Array,
        time_BK: jax.Array,
        level_BN: jax.Array | None,
        text_BSE: jax.Array,
        text_mask_BS: jax.Array | None = None,
        *,
        place_N3: jax.Array | None = None,
    ) -> jax.Array:
        """Predicts the velocity of a noisy latent.

        Args:
          latent_Bthwz: noisy latent, z = latent_channels + extra_channels.
          time_BK: the K noise levels of each clip, in [0, 1]; 1 is noise.
          level_BN: int, which of its clip's levels each token has; None: all have level 0.
          text_BSE: text features.
          text_mask_BS: True where a text token is real; None: all are.
          place_N3: the tokens' places if they are not 0, 1, 2, ...; see `embeddings.grid_places`.

        Returns:
          velocity_Bthwz in float32, z = latent_channels.

        Raises:
          ValueError: if a field or a shape does not fit.
        """
        self._check(latent_Bthwz, time_BK)
        _, t, h, w, _ = latent_Bthwz.shape
        grid = shapes.token_grid((t, h, w), self.patch)
        if place_N3 is None:
            place_N3 = embeddings.grid_places(grid)

        # Tokens.
        x_BND = embeddings.PatchEmbed(self.width, self.patch, self.dtype, name="patch")(latent_Bthwz)
        turns = None
        if self.positions == "rotary":
            turns = embeddings.rotary_turns(place_N3, self.width // self.num_heads, theta=self.rope_theta)
        else:
            x_BND += embeddings.sincos_places(place_N3, self.width, theta=self.rope_theta).astype(self.dtype)
        num_video, num_levels = x_BND.shape[1], time_BK.shape[1]

        # Text.
        dense = functools.partial(linear, dtype=self.dtype)
        text_BSD = nn.gelu(dense(self.width, "text", "mlp", name="text_in")(text_BSE.astype(self.dtype)))
        text_BSD = dense(self.width, "mlp", "width", name="text_out")(text_BSD)
        if self.text_path == "joint":
            x_BND, level_BN, time_BK = _append_text(x_BND, text_BSD, level_BN, time_BK)
        x_BND = constrain(x_BND, "batch", "tokens", None)

        # Time.
        features_BKC = embeddings.time_features(time_BK, self.time_features)
        time_BKD = nn.silu(linear(self.width, None, "mlp", name="time_in")(features_BKC))
        time_BKD = linear(self.width, "mlp", "width", name="time_out")(time_BKD)
        modulation = linear(6 * self.width, "width", "mlp", init=zeros, name="time_modulation")(nn.silu(time_BKD))

        # Blocks.
        x_BND = self._layers(grid)(
            x_BND,
            Conditions(
                modulation_BK6D=modulation.reshape(*time_BK.shape, 6, self.width),
                level_BN=level_BN,
                text_BSD=text_BSD if self.text_path == "cross" else None,
                text_mask_BS=text_mask_BS,
                turns=turns,
            ),
        )

        # Head.
        x_BND, level_BN = x_BND[:, :num_video], None if level_BN is None else level_BN[:, :num_video]
        table_2D = self.param("head_modulation", partitioned(zeros, None, "width"), (2, self.width))
        shift_BKD, scale_BKD = (time_BKD[:, :num_levels] + row for row in table_2D)
        x_BND = modulate(x_BND, shift_BKD, scale_BKD, level_BN)
        velocity = embeddings.PatchUnembed(self.latent_channels, self.patch, self.dtype, name="head")(x_BND, grid)
        return velocity.astype(jnp.float32)

    def _layers(self, grid: Size3) -> Callable[[jax.Array, Conditions], jax.Array]:
        """The stack of blocks: turns of the attention cycle, scanned (one compiled turn) or written out."""
        block = Block
        if self.remat != "nothing":
            # Inside a scan nothing can be merged across the loop, so the costly guard against it is not needed.
            block = nn.remat(Block, policy=REMAT[self.remat], prevent_cse=not self.scan_layers)
        cycle = tuple(
            functools.partial(
                block,
                num_heads=self.num_heads,
                mlp_width=self.mlp_width,
                qk_norm=self.qk_norm,
                grid=grid,
                pattern=pattern,
                window=self.window,
                joint=self.text_path == "joint",
                dtype=self.dtype,
            )
            for pattern in self.attention
        )
        num_turns = self.num_layers // len(self.attention)
        if self.scan_layers:
            scanned = nn.scan(
                Turn,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=num_turns,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(cycle, name="layers")
            return lambda x_BND, conditions: scanned(x_BND, conditions)[0]

        turns = [Turn(cycle, name=f"layers_{i}") for i in range(num_turns)]
        return lambda x_BND, conditions: functools.reduce(lambda x, turn: turn(x, conditions)[0], turns, x_BND)

    def _check(self, latent_Bthwz: jax.Array, time_BK: jax.Array) -> None:
        for pattern in self.attention:
            check_kind(pattern)
        _choose("text_path", self.text_path, ("cross", "joint"))
        _choose("positions", self.positions, ("rotary", "sincos"))
        _choose("remat", self.remat, tuple(REMAT))
        if self.num_layers % len(self.attention):
            raise ValueError(
                f"num_layers={self.num_layers}: the attention cycle {tuple(self.attention)} has "
                f"{len(self.attention)} layers, so use a multiple of {len(self.attention)}."
            )
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width}: use a multiple of num_heads={self.num_heads}.")
        channels = self.latent_channels + self.extra_channels
        if latent_Bthwz.ndim != 5 or latent_Bthwz.shape[-1] != channels:
            raise ValueError(
                f"latent of shape {latent_Bthwz.shape}: expected (B, t, h, w, {channels}), channels = "
                f"latent_channels {self.latent_channels} + extra_channels {self.extra_channels}."
            )
        if time_BK.ndim != 2:
            raise ValueError(f"time of shape {time_BK.shape}: expected (B, K); one level per clip is time[:, None].")


class Turn(nn.Module):
    """One turn of the attention cycle: what `nn.scan` repeats."""

    cycle: tuple[Callable[..., nn.Module], ...]

    @nn.compact
    def __call__(self, x_BND: jax.Array, conditions: Conditions) -> tuple[jax.Array, None]:
        for i, block in enumerate(self.cycle):
            x_BND = block(name=f"block_{i}")(x_BND, conditions)
        return x_BND, None


class Block(nn.Module):
    """Self-attention, cross-attention (unless the text is in the sequence) and MLP, modulated by time."""

    num_heads: int
    mlp_width: int
    qk_norm: bool
    grid: Size3
    pattern: str
    window: Size3 | None
    joint: bool
    dtype: jax.typing.DTypeLike

    @nn.compact
    def __call__(self, x_BND: jax.Array, conditions: Conditions) -> jax.Array:
        D, level_BN = x_BND.shape[-1], conditions.level_BN
        projected = functools.partial(Attention, num_heads=self.num_heads, qk_norm=self.qk_norm, dtype=self.dtype)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self._modulation(conditions.modulation_BK6D)

        y_BND = modulate(x_BND, shift_1, scale_1, level_BN)
        y_BND = projected(name="self_attention")(functools.partial(self._attend, conditions), y_BND)
        x_BND = add_gated(x_BND, gate_1, y_BND, level_BN)

        if not self.joint:
            norm = nn.LayerNorm(
                epsilon=EPSILON,
                dtype=jnp.float32,
                scale_init=partitioned(nn.initializers.ones, "width"),
                bias_init=partitioned(zeros, "width"),
                name="cross_norm",
            )
            y_BND = norm(x_BND).astype(self.dtype)
            see_text = functools.partial(cross_attention, mask_BS=conditions.text_mask_BS)
            x_BND += projected(out_init=zeros, name="cross_attention")(see_text, y_BND, conditions.text_BSD)

        y_BND = modulate(x_BND, shift_2, scale_2, level_BN)
        y_BNF = nn.gelu(linear(self.mlp_width, "width", "mlp", dtype=self.dtype, name="mlp_in")(y_BND))
        y_BND = linear(D, "mlp", "width", dtype=self.dtype, name="mlp_out")(y_BNF)
        x_BND = add_gated(x_BND, gate_2, y_BND, level_BN)
        return constrain(x_BND, "batch", "tokens", None)

    def _modulation(self, modulation_BK6D: jax.Array) -> list[jax.Array]:
        """Six arrays [B, K, D]: shift, scale, gate of self-attention, then of the MLP."""
        D = modulation_BK6D.shape[-1]
        table_6D = self.param("modulation", partitioned(zeros, None, "width"), (6, D))
        table_K6D = table_6D[None]
        if self.joint:  # the last level is the text's, with a table of its own
            text_table_6D = self.param("text_modulation", partitioned(zeros, None, "width"), (6, D))
            num_levels = modulation_BK6D.shape[1] - 1
            table_K6D = jnp.stack([table_6D] * num_levels + [text_table_6D])
        return [x.squeeze(2) for x in jnp.split(modulation_BK6D + table_K6D, 6, axis=2)]

    def _attend(self, conditions: Conditions, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """Self-attention of the sequence: video under its pattern and, in a joint layer, text after it."""
        num_video = math.prod(self.grid)
        (q, text_q), (k, text_k), (v, text_v) = ((x[:, :num_video], x[:, num_video:]) for x in (q, k, v))
        if conditions.turns is not None:
            q, k = embeddings.rotate(q, conditions.turns), embeddings.rotate(k, conditions.turns)
        how: Any = dict(grid=self.grid, pattern=self.pattern, window=self.window)
        if not self.joint:
            return attention(q, k, v, **how)
        mask_BS = conditions.text_mask_BS
        video, text = joint_attention((q, k, v), (text_q, text_k, text_v), **how, text_mask_BS=mask_BS)
        return jnp.concatenate([video, text], axis=1)


class Attention(nn.Module):
    """Projections around an attention: queries from x; keys and values from x too, or from a text where one is given.

    Queries and keys are RMS-normalised over the whole width, before it is cut into heads (as in Wan).
    """

    num_heads: int
    qk_norm: bool
    dtype: jax.typing.DTypeLike
    out_init: nn.initializers.Initializer = xavier

    @nn.compact
    def __call__(
        self,
        attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
        x_BND: jax.Array,
        text_BSD: jax.Array | None = None,
    ) -> jax.Array:
        D = x_BND.shape[-1]

        def project(name: str, y: jax.Array, length: str, *, normalised: bool = False) -> jax.Array:
            y = linear(D, "width", "heads", dtype=self.dtype, name=name)(y)
            if normalised and self.qk_norm:
                scale_init = partitioned(nn.initializers.ones, "heads")
                norm = nn.RMSNorm(epsilon=EPSILON, dtype=jnp.float32, scale_init=scale_init, name=f"{name}_norm")
                y = norm(y).astype(self.dtype)
            heads = y.reshape(*y.shape[:2], self.num_heads, D // self.num_heads)
            return constrain(heads, "batch", length, "heads", None)

        source, length = (x_BND, "tokens") if text_BSD is None else (text_BSD, "text")
        q_BNAd = project("query", x_BND, "tokens", normalised=True)
        k_BMAd = project("key", source, length, normalised=True)
        v_BMAd = project("value", source, length)
        out_BND = attend(q_BNAd, k_BMAd, v_BMAd).reshape(x_BND.shape)
        return linear(D, "heads", "width", init=self.out_init, dtype=self.dtype, name="out")(out_BND)


@functools.partial(jax.checkpoint, prevent_cse=False)  # keeps x alone for the backward pass, no [B, N, D] modulation
def modulate(x_BND: jax.Array, shift_BKD: jax.Array, scale_BKD: jax.Array, level_BN: jax.Array | None) -> jax.Array:
    """LayerNorm(x) (1 + scale) + shift, each token with the shift and scale of its level; float32 inside."""
    x = x_BND.astype(jnp.float32)
    x = x - x.mean(axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + EPSILON)
    return (x * (1 + select(scale_BKD, level_BN)) + select(shift_BKD, level_BN)).astype(x_BND.dtype)


@functools.partial(jax.checkpoint, prevent_cse=False)
def add_gated(x_BND: jax.Array, gate_BKD: jax.Array, y_BND: jax.Array, level_BN: jax.Array | None) -> jax.Array:
    """x + gate * y, each token with the gate of its level; float32 inside."""
    return (x_BND.astype(jnp.float32) + select(gate_BKD, level_BN) * y_BND).astype(x_BND.dtype)


def select(values_BKD: jax.Array, level_BN: jax.Array | None) -> jax.Array:
    """Each token's row of K: [B, N, D], or [B, 1, D] where there is one level.

    A chain of K selects and not a gather: selects melt into the arithmetic around them, and their gradient is a sum
    over tokens where a gather's is a scatter.
    """
    num_levels = values_BKD.shape[1]
    chosen = values_BKD[:, :1]
    if level_BN is None:
        return chosen
    for k in range(1, num_levels):
        chosen = jnp.where(level_BN[..., None] == k, values_BKD[:, k : k + 1], chosen)
    return chosen


def _append_text(
    x_BND: jax.Array, text_BSD: jax.Array, level_BN: jax.Array | None, time_BK: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One sequence of video and text; the text gets a level of its own, the last, at the clip's noisiest time."""
    (B, N, _), S, K = x_BND.shape, text_BSD.shape[1], time_BK.shape[1]
    level_BN = jnp.zeros((B, N), jnp.int32) if level_BN is None else level_BN
    return (
        jnp.concatenate([x_BND, text_BSD], axis=1),
        jnp.concatenate([level_BN, jnp.full((B, S), K, level_BN.dtype)], axis=1),
        jnp.concatenate([time_BK, time_BK.max(axis=1, keepdims=True)], axis=1),
    )


def _choose(name: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        near = difflib.get_close_matches(value, options, n=1)
        raise ValueError(
            f"{name}={value!r}: " + (f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(options)}.")
        )
