# SPDX-License-Identifier: Apache-2.0
"""The block of the spacetime transformer: what tokens pass through between two sums of themselves.

    x = x + gate_1 * SelfAttention(modulate(LayerNorm(x), shift_1, scale_1))
    x = x +          CrossAttention(LayerNorm(x), text, image)                     where text_path="cross"
    x = x + gate_2 * MLP(modulate(LayerNorm(x), shift_2, scale_2))                 modulate(y, a, b) = y (1 + b) + a

A *stream* is a kind of tokens with weights of its own. The block itself is the video's. What is beside the video (text,
or the time where that is a token) follows it in the same sequence, or is a second stream (text_path="dual"); one
attention sees both. Shifts, scales and gates come with `Conditions`. Where none come, time being a token, nothing is
shifted, gates are one, and norms have weights.

    (x_BND, text_BSD) = Block(text_path="dual", time_path="adaln_zero", ...)((x_BND, text_BSD), conditions)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from stvdm.models import embeddings
from stvdm.models.attention import attention, cross_attention, joint_attention
from stvdm.models.linear import linear, xavier, zeros
from stvdm.models.patterns import Size3
from stvdm.sharding import constrain, partitioned

MODULATED = ("adaln_zero", "adaln")  # the time paths in which time modulates; in the others it is a token
EPSILON = 1e-6

Heads = tuple[jax.Array, jax.Array, jax.Array]  # queries, keys and values


class Modulation(NamedTuple):
    """What the time tells a stream."""

    rows_BK6D: jax.Array  # float32: shift, scale, gate of self-attention, then of the MLP, for each noise level
    level_BN: jax.Array | None  # which of the K levels a token has; None: all have the first


class Conditions(NamedTuple):
    """What every block is told beside its tokens."""

    modulation: Modulation | None  # of the sequence; None: time is a token
    text_modulation: Modulation | None  # of the second stream
    beside_mask_BS: jax.Array | None  # which tokens beside the video, in its sequence or the second stream, are real
    read_BSD: jax.Array | None  # for cross-attention
    read_mask_BS: jax.Array | None
    turns: embeddings.Turns | None  # rotary turns of the video tokens
    image_BSD: jax.Array | None = None  # tokens of an image that cross-attention reads beside the rest


class Rows(NamedTuple):
    """A block's modulation of a stream."""

    parts: tuple[list[jax.Array], list[jax.Array]]  # [shift_BKD, scale_BKD, gate_BKD] of self-attention, and of the MLP
    level_BN: jax.Array | None


class Stream(nn.Module):
    """The weights that one kind of tokens passes through in a block."""

    width: int
    num_heads: int
    mlp_width: int
    qk_norm: bool
    time_path: str
    length: str  # the logical axis of the tokens: "tokens", or "text"
    dtype: jax.typing.DTypeLike

    def setup(self) -> None:
        self.self_attention = Attention(self.width, self.num_heads, self.qk_norm, self.dtype)
        self.mlp_in = linear(self.mlp_width, "width", "mlp", dtype=self.dtype)
        self.mlp_out = linear(self.width, "mlp", "width", dtype=self.dtype)
        if self.time_path in MODULATED:
            self.modulation = self.make_table("modulation")
        else:
            self.norm_1, self.norm_2 = layer_norm(), layer_norm()

    def make_table(self, name: str) -> jax.Array:
        """A block's own addition to what the time tells; gates start at zero, or in plain adaLN at one."""
        init = zeros if self.time_path == "adaln_zero" else _gates_of_one
        return self.param(name, partitioned(init, None, "width"), (6, self.width))

    def tables_K6D(self, num_levels: int) -> jax.Array:
        """The block's own table, for each level or once for all."""
        return self.modulation[None]

    def rows(self, told: Modulation | None) -> Rows | None:
        if told is None:
            return None
        both_BK6D = told.rows_BK6D + self.tables_K6D(told.rows_BK6D.shape[1])
        values = [x.squeeze(2) for x in jnp.split(both_BK6D, 6, axis=2)]
        return Rows((values[:3], values[3:]), told.level_BN)

    def add_mlp(self, x_BND: jax.Array, rows: Rows | None) -> jax.Array:
        y_BNF = nn.gelu(self.mlp_in(self.normed(1, x_BND, rows)))
        return constrain(self.added(1, x_BND, self.mlp_out(y_BNF), rows), "batch", self.length, None)

    def normed(self, i: int, x_BND: jax.Array, rows: Rows | None) -> jax.Array:
        """What goes into self-attention (0) or the MLP (1)."""
        if rows is None:
            return (self.norm_1, self.norm_2)[i](x_BND).astype(self.dtype)
        shift_BKD, scale_BKD, _ = rows.parts[i]
        return modulate(x_BND, shift_BKD, scale_BKD, rows.level_BN)

    def added(self, i: int, x_BND: jax.Array, y_BND: jax.Array, rows: Rows | None) -> jax.Array:
        """The tokens and what came out."""
        return x_BND + y_BND if rows is None else add_gated(x_BND, rows.parts[i][2], y_BND, rows.level_BN)


class Block(Stream):
    """The stream of the video, in which it may have company, or beside which there is a second."""

    text_path: str
    grid: Size3
    pattern: str
    window: Size3 | None
    reads_image: bool = False

    def setup(self) -> None:
        super().setup()
        if self.text_path == "cross":
            out_init = zeros if self.time_path == "adaln_zero" else xavier
            self.cross_norm = layer_norm()
            self.cross_attention = Attention(
                self.width, self.num_heads, self.qk_norm, self.dtype, out_init, self.reads_image
            )
        elif self.text_path == "dual":
            same = ("width", "num_heads", "mlp_width", "qk_norm", "time_path", "dtype")
            self.text = Stream(**{name: getattr(self, name) for name in same}, length="text")
        elif self.time_path in MODULATED:
            self.text_modulation = self.make_table("text_modulation")

    def __call__(
        self, streams: tuple[jax.Array, jax.Array | None], conditions: Conditions
    ) -> tuple[jax.Array, jax.Array | None]:
        x_BND, text_BSD = streams
        rows, attend = self.rows(conditions.modulation), functools.partial(self._attend, conditions)
        y_BND = self.normed(0, x_BND, rows)
        if text_BSD is None:
            y_BND = self.self_attention(attend, y_BND)
        else:
            N, text_rows = x_BND.shape[1], self.text.rows(conditions.text_modulation)
            text_y_BSD = self.text.normed(0, text_BSD, text_rows)
            both_BMD = self.self_attention(attend, y_BND, beside=(self.text.self_attention, text_y_BSD))
            y_BND, text_y_BSD = both_BMD[:, :N], both_BMD[:, N:]
            text_BSD = self.text.add_mlp(self.text.added(0, text_BSD, text_y_BSD, text_rows), text_rows)
        x_BND = self.added(0, x_BND, y_BND, rows)
        if conditions.read_BSD is not None:
            read = functools.partial(cross_attention, mask_BS=conditions.read_mask_BS)
            y_BND = self.cross_norm(x_BND).astype(self.dtype)
            x_BND += self.cross_attention(read, y_BND, conditions.read_BSD, image_BSD=conditions.image_BSD)
        return self.add_mlp(x_BND, rows), text_BSD

    def tables_K6D(self, num_levels: int) -> jax.Array:
        """In the joint sequence the last level is the text's, with a table of its own."""
        if self.text_path != "joint":
            return self.modulation[None]
        return jnp.stack([self.modulation] * (num_levels - 1) + [self.text_modulation])

    def _attend(self, conditions: Conditions, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """Self-attention: of the video under its pattern, and of what follows it."""
        N = math.prod(self.grid)
        is_alone = q.shape[1] == N
        (q, text_q), (k, text_k), (v, text_v) = ((x[:, :N], x[:, N:]) for x in (q, k, v))
        if conditions.turns is not None:
            q, k = embeddings.rotate(q, conditions.turns), embeddings.rotate(k, conditions.turns)
        how: Any = dict(grid=self.grid, pattern=self.pattern, window=self.window)
        if is_alone:
            return attention(q, k, v, **how)
        beside_qkv, mask_BS = (text_q, text_k, text_v), conditions.beside_mask_BS
        return jnp.concatenate(joint_attention((q, k, v), beside_qkv, **how, text_mask_BS=mask_BS), axis=1)


class Attention(nn.Module):
    """Projections around an attention: queries from x; keys and values from x too, or from a text where one is given.

    Queries and keys are RMS-normalised over the whole width, before it is cut into heads (as in Wan). An image that is
    read beside a text has keys and values of its own, and a softmax: what is found in the two is summed (Wan's
    image-to-video; IP-Adapter, arXiv:2308.06721).
    """

    width: int
    num_heads: int
    qk_norm: bool
    dtype: jax.typing.DTypeLike
    out_init: nn.initializers.Initializer = xavier
    reads_image: bool = False

    def setup(self) -> None:
        of_heads = functools.partial(linear, self.width, "width", "heads", dtype=self.dtype)
        self.query, self.key, self.value = of_heads(), of_heads(), of_heads()
        scale_init = partitioned(nn.initializers.ones, "heads")
        norm = functools.partial(nn.RMSNorm, epsilon=EPSILON, dtype=jnp.float32, scale_init=scale_init)
        if self.qk_norm:
            self.query_norm, self.key_norm = norm(), norm()
        if self.reads_image:
            self.image_key, self.image_value = of_heads(), of_heads()
            if self.qk_norm:
                self.image_key_norm = norm()
        self.out = linear(self.width, "heads", "width", init=self.out_init, dtype=self.dtype)

    def __call__(
        self,
        attend: Callable[..., jax.Array],
        x_BND: jax.Array,
        text_BSD: jax.Array | None = None,
        *,
        beside: tuple[Attention, jax.Array] | None = None,
        image_BSD: jax.Array | None = None,
    ) -> jax.Array:
        """y_BND of an attention (q_BNAd, k, v) -> out_BNAd.

        Args:
          text_BSD: where keys and values come from; None: from x.
          beside: tokens that follow x in the attention and in y, and the projections that they go through.
          image_BSD: tokens that are read beside the text.
        """
        own_qkv = self.project(x_BND, text_BSD)
        if image_BSD is not None:
            found_BNAd = cross_attention(own_qkv[0], *self.project_image(image_BSD))
            return self.merge(attend(*own_qkv) + found_BNAd)
        if beside is None:
            return self.merge(attend(*own_qkv))
        other, other_BSD = beside
        pairs = zip(own_qkv, other.project(other_BSD, length="text"), strict=True)
        out_BMAd = attend(*(jnp.concatenate(pair, axis=1) for pair in pairs))
        N = x_BND.shape[1]
        return jnp.concatenate([self.merge(out_BMAd[:, :N]), other.merge(out_BMAd[:, N:])], axis=1)

    def project(self, x_BND: jax.Array, text_BSD: jax.Array | None = None, *, length: str = "tokens") -> Heads:
        """Queries, keys and values by head; ``length`` is the logical axis of x's tokens."""
        source, source_length = (x_BND, length) if text_BSD is None else (text_BSD, "text")
        q, k, v = self.query(x_BND), self.key(source), self.value(source)
        if self.qk_norm:
            q, k = self.query_norm(q).astype(self.dtype), self.key_norm(k).astype(self.dtype)
        return self.by_head(q, length), self.by_head(k, source_length), self.by_head(v, source_length)

    def project_image(self, image_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values by head."""
        k, v = self.image_key(image_BSD), self.image_value(image_BSD)
        if self.qk_norm:
            k = self.image_key_norm(k).astype(self.dtype)
        return self.by_head(k, "text"), self.by_head(v, "text")

    def by_head(self, y_BND: jax.Array, length: str) -> jax.Array:
        heads_BNAd = y_BND.reshape(*y_BND.shape[:2], self.num_heads, self.width // self.num_heads)
        return constrain(heads_BNAd, "batch", length, "heads", None)

    def merge(self, out_BNAd: jax.Array) -> jax.Array:
        """The output's projection of all heads together."""
        return self.out(out_BNAd.reshape(*out_BNAd.shape[:2], self.width))


def layer_norm(name: str | None = None, *, axis: str = "width", epsilon: float = EPSILON) -> nn.LayerNorm:
    """With weights, in float32; ``axis`` is their logical name."""
    return nn.LayerNorm(
        epsilon=epsilon,
        dtype=jnp.float32,
        scale_init=partitioned(nn.initializers.ones, axis),
        bias_init=partitioned(zeros, axis),
        name=name,
    )


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


def _gates_of_one(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
    is_gate = jnp.arange(6) % 3 == 2
    return jnp.broadcast_to(is_gate[:, None], shape).astype(dtype)
