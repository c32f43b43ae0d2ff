# SPDX-License-Identifier: Apache-2.0
"""A linear layer that says how its weight is split over a mesh, and whose gradient is one plain matrix product.

y = x W + b        over the last dimension;  + (x A) B where a low-rank adapter lies beside W (`models.lora`)

y_BNF = linear(F, "width", "mlp", name="mlp_in")(x_BND)
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from stvdm.sharding import partitioned

xavier, zeros = nn.initializers.xavier_uniform(), nn.initializers.zeros


class Linear(nn.Dense):
    """A Dense layer that also passes through what lies beside its kernel under "down" and "up"."""

    def __call__(self, inputs: jax.Array) -> jax.Array:
        y = super().__call__(inputs)
        if self.has_variable("params", "down"):
            down, up = (self.get_variable("params", name).astype(y.dtype) for name in ("down", "up"))
            last_by_first = (((inputs.ndim - 1,), (0,)), ((), ()))
            y += _dot_general(_dot_general(inputs.astype(y.dtype), down, last_by_first), up, last_by_first)
        return y


def linear(
    features: int,
    axis_in: str | None,
    axis_out: str | None,
    *,
    name: str | None = None,
    init: nn.initializers.Initializer = xavier,
    dtype: jax.typing.DTypeLike = jnp.float32,
    use_bias: bool = True,
) -> nn.Dense:
    """A linear layer in ``dtype`` with float32 parameters; the axes are logical names of `sharding.AXIS_RULES`.

    Args:
      name: of its parameters; in a module's ``setup`` that is the attribute's.
    """
    return Linear(
        features,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=partitioned(init, axis_in, axis_out),
        bias_init=partitioned(zeros, axis_out),
        dot_general=_dot_general,
        name=name,
    )


def _dot_general(x: jax.Array, w: jax.Array, dimensions: Any, **options: Any) -> jax.Array:
    """x W with all leading dimensions of x as one.

    The gradient for W sums over the leading dimensions. Over two of them (clips, tokens) XLA's CPU compiler first
    transposes the whole cotangent: the product takes 2.7 times as long (2,560 x 192 x 768, float32). Where tokens
    are split over the mesh the dimensions stay apart, for merged they could not stay split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if x.ndim == 2 or (not mesh.empty and mesh.shape["context"] > 1):
        return jax.lax.dot_general(x, w, dimensions, **options)
    rows = x.reshape(-1, x.shape[-1])
    return jax.lax.dot_general(rows, w, (((1,), (0,)), ((), ())), **options).reshape(*x.shape[:-1], w.shape[-1])
