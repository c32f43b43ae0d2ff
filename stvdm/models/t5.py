# SPDX-License-Identifier: Apache-2.0
"""The encoders of T5 (Raffel et al. 2019, arXiv:1910.10683; v1.1: Shazeer 2020, arXiv:2002.05202) and UMT5 (Chung et
al. 2023, arXiv:2304.09151), which read the text for most open video models.

    x += W_o Attention(RMSNorm(x));    x += W_2 (act(W_g RMSNorm(x)) * W_1 RMSNorm(x))
    logits = q kᵀ + bias[distance, head],   not divided by √d

    tower, params, tokenizer = towers.t5("google/umt5-xxl")                      # stvdm.interop.towers
    read = tower.apply({"params": params}, *tokenizer(["a red ball bounces"]))   # `Read`

Where a token stands is told by the distance between query and key alone, in buckets that widen with it. T5 has one
table of them, in its first layer, for all; UMT5 one in each. No layer has a bias, and no limit is set to the length.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from stvdm.models.linear import linear
from stvdm.models.transformer import ACTIVATIONS
from stvdm.sharding import constrain, partitioned


class Read(NamedTuple):
    """What the tower makes of text; its N are tokens of text, as of CLIP's.

    hidden_BND: of the last layer, after the last norm: transformers' last_hidden_state.
    layers_BND: what enters the first layer, then what each layer gives.
    """

    hidden_BND: jax.Array
    layers_BND: tuple[jax.Array, ...]


class T5(nn.Module):
    """Tokens to `Read`; the defaults are UMT5-XXL's. Parameters, norms, softmax and the sums of layers are float32.

    Raises:
      ValueError: for an unknown activation.
    """

    vocabulary_size: int = 256384
    width: int = 4096
    num_layers: int = 24
    num_heads: int = 64
    head_width: int = 64
    mlp_width: int = 10240
    activation: str = "gelu_tanh"
    gated: bool = True  # v1.1 and UMT5; the first T5 is not, and has relu
    num_buckets: int = 32
    max_distance: int = 128  # and beyond is one bucket
    tables: str = "each"  # of distances: one in 'each' layer (UMT5), or in the 'first', for all (T5)
    epsilon: float = 1e-6
    dtype: Any = "float32"

    @nn.compact
    def __call__(self, tokens_BS: jax.Array, mask_BS: jax.Array | None = None) -> Read:
        """``mask_BS`` is True where a token is real; None: everywhere."""
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r}: expected one of {', '.join(ACTIVATIONS)}.")
        if self.tables not in ("each", "first"):
            raise ValueError(f"tables={self.tables!r}: expected 'each' or 'first'.")
        words_VD = self.param(
            "words", partitioned(nn.initializers.normal(1.0), "vocab", "width"), (self.vocabulary_size, self.width)
        )
        every = [jnp.asarray(words_VD)[tokens_BS].astype(jnp.float32)]
        buckets_SS = distance_buckets(tokens_BS.shape[1], self.num_buckets, self.max_distance)
        for i in range(self.num_layers):
            if i == 0 or self.tables == "each":
                small = partitioned(nn.initializers.normal(self.width**-0.5), None, "heads")
                table_VA = self.param(f"distances_{i}", small, (self.num_buckets, self.num_heads))
                bias_1ASS = jnp.asarray(table_VA)[buckets_SS].transpose(2, 0, 1)[None].astype(jnp.float32)
            layer = Layer(
                self.num_heads,
                self.head_width,
                self.mlp_width,
                self.activation,
                self.gated,
                self.epsilon,
                self.dtype,
                name=f"layer_{i}",
            )
            every.append(layer(every[-1], bias_1ASS, mask_BS))
        return Read(_norm("norm", self.epsilon)(every[-1]), tuple(every))


class Layer(nn.Module):
    """One of `T5`."""

    num_heads: int
    head_width: int
    mlp_width: int
    activation: str
    gated: bool
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x_BSD: jax.Array, bias_1ASS: jax.Array, mask_BS: jax.Array | None) -> jax.Array:
        (B, S, D), A, dtype = x_BSD.shape, self.num_heads, jnp.dtype(self.dtype)
        y_BSD = _norm("attention_norm", self.epsilon)(x_BSD)
        q, k, v = (
            constrain(
                linear(A * self.head_width, "width", "heads", name=name, dtype=dtype, use_bias=False)(y_BSD).reshape(
                    B, S, A, self.head_width
                ),
                "batch",
                None,
                "heads",
                None,
            )
            for name in ("query", "key", "value")
        )
        mask = None if mask_BS is None else mask_BS[:, None, None, :]
        y_BSAd = jax.nn.dot_product_attention(q, k, v, bias=bias_1ASS, mask=mask, scale=1.0)
        y_BSD = linear(D, "heads", "width", name="out", dtype=dtype, use_bias=False)(y_BSAd.reshape(B, S, -1))
        x_BSD = x_BSD + y_BSD

        y_BSD = _norm("mlp_norm", self.epsilon)(x_BSD)
        act = ACTIVATIONS[self.activation]
        y_BSF = linear(self.mlp_width, "width", "mlp", name="mlp_in", dtype=dtype, use_bias=False)(y_BSD)
        if self.gated:
            y_BSF *= act(linear(self.mlp_width, "width", "mlp", name="mlp_gate", dtype=dtype, use_bias=False)(y_BSD))
        else:
            y_BSF = act(y_BSF)
        x_BSD = x_BSD + linear(D, "mlp", "width", name="mlp_out", dtype=dtype, use_bias=False)(y_BSF)
        return constrain(x_BSD, "batch", None, None)


def distance_buckets(num_tokens: int, num_buckets: int = 32, max_distance: int = 128) -> np.ndarray:
    """The row of a table of distances for each (query, key), int32 (S, S).

    Half of the rows are for keys behind the query. Of each half the first half is for one distance each, and those of
    the other widen by a constant factor until ``max_distance``, which the last has with all beyond.
    """
    half = num_buckets // 2
    exact = half // 2
    away = np.arange(num_tokens)[None, :] - np.arange(num_tokens)[:, None]
    far = np.maximum(np.abs(away), exact).astype(np.float32)  # in float32 as the references, for the edges of buckets
    widening = np.log(far / exact) / np.float32(math.log(max_distance / exact)) * (half - exact)
    row = np.where(np.abs(away) < exact, np.abs(away), np.minimum(exact + widening.astype(np.int32), half - 1))
    return (row + np.where(away > 0, half, 0)).astype(np.int32)


def _norm(name: str, epsilon: float) -> nn.RMSNorm:
    """x / sqrt(mean(x²) + epsilon), scaled, in float32."""
    return nn.RMSNorm(epsilon=epsilon, scale_init=partitioned(nn.initializers.ones, "width"), name=name)
