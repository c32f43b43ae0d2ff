# SPDX-License-Identifier: Apache-2.0
"""The pre-norm transformer layer that CLIP's two towers and VideoMAE are made of (Vaswani et al. 2017,
arXiv:1706.03762, with the norms before attention and MLP).

    x += Attention(LayerNorm(x));    x += W2 act(W1 LayerNorm(x))

    layers = Layers(num_layers=12, num_heads=12, mlp_width=3072, activation="quick_gelu")
    every_BND = layers.apply({"params": params}, tokens_BND)       # what goes in, then what each layer gives

What networks of this family differ in is a field: the activation, the norm's epsilon, whether a token sees only those
before it, whether keys have a bias. Parameters, norms and the softmax are float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from stvdm.models.linear import linear
from stvdm.sharding import constrain, partitioned

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # of OpenAI's CLIP (arXiv:2103.00020)
    "relu": nn.relu,
    "silu": nn.silu,
}


class Layers(nn.Module):
    """A stack of layers; gives what goes in and what each layer puts out, num_layers + 1 arrays of (B, N, D).

    Raises:
      ValueError: for an unknown activation, or a width that the heads do not divide.
    """

    num_layers: int
    num_heads: int
    mlp_width: int
    activation: str = "gelu"
    epsilon: float = 1e-5
    causal: bool = False
    key_bias: bool = True
    dtype: Any = "float32"

    @nn.compact
    def __call__(self, tokens_BND: jax.Array, mask_BN: jax.Array | None = None) -> tuple[jax.Array, ...]:
        """``mask_BN`` is True where a token may be looked at; None: everywhere."""
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r}: expected one of {', '.join(ACTIVATIONS)}.")
        if tokens_BND.shape[-1] % self.num_heads:
            raise ValueError(f"width={tokens_BND.shape[-1]}: expected a multiple of num_heads={self.num_heads}.")
        every = [tokens_BND]
        for i in range(self.num_layers):
            layer = Layer(
                self.num_heads,
                self.mlp_width,
                self.activation,
                self.epsilon,
                self.causal,
                self.key_bias,
                self.dtype,
                name=f"layer_{i}",
            )
            every.append(layer(every[-1], mask_BN))
        return tuple(every)


class Layer(nn.Module):
    """One of `Layers`."""

    num_heads: int
    mlp_width: int
    activation: str
    epsilon: float
    causal: bool
    key_bias: bool
    dtype: Any

    @nn.compact
    def __call__(self, x_BND: jax.Array, mask_BN: jax.Array | None = None) -> jax.Array:
        (B, N, D), A, dtype = x_BND.shape, self.num_heads, jnp.dtype(self.dtype)
        y_BND = norm("attention_norm", self.epsilon)(x_BND)
        q, k, v = (
            constrain(
                linear(D, "width", "heads", name=name, dtype=dtype, use_bias=bias)(y_BND).reshape(B, N, A, D // A),
                "batch",
                None,
                "heads",
                None,
            )
            for name, bias in (("query", True), ("key", self.key_bias), ("value", True))
        )
        mask = None if mask_BN is None else mask_BN[:, None, None, :]
        y_BND = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=self.causal).reshape(B, N, D)
        x_BND = x_BND + linear(D, "heads", "width", name="out", dtype=dtype)(y_BND)

        y_BND = norm("mlp_norm", self.epsilon)(x_BND)
        y_BNF = ACTIVATIONS[self.activation](linear(self.mlp_width, "width", "mlp", name="mlp_in", dtype=dtype)(y_BND))
        x_BND = x_BND + linear(D, "mlp", "width", name="mlp_out", dtype=dtype)(y_BNF)
        return constrain(x_BND, "batch", None, None)


def norm(name: str, epsilon: float) -> nn.LayerNorm:
    """LayerNorm in float32; ``epsilon`` is added to the variance."""
    return nn.LayerNorm(
        epsilon=epsilon,
        use_fast_variance=False,  # E[x²] - E[x]² loses digits that the references keep
        scale_init=partitioned(nn.initializers.ones, "width"),
        bias_init=partitioned(nn.initializers.zeros, "width"),
        name=name,
    )
