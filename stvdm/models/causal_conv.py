# SPDX-License-Identifier: Apache-2.0
"""The two layers that make streaming exact: a convolution that looks back in time only, and a norm of one position.

A causal convolution with k taps needs k - 1 past inputs, zeros at the start of a clip. Streamed, it leaves the last of
its inputs in the collection "cache" and finds them there when the next chunk comes, so that chunks give what the whole
clip gives. The norm sees the channels of a single position, and so can't tell a chunk from a clip.

    conv = CausalConv(32, (3, 3, 3))
    whole = conv.apply({"params": params}, video_BTHWC)
    head, kept = conv.apply({"params": params}, video_BTHWC[:, :5], mutable=["cache"])
    tail, kept = conv.apply({"params": params, **kept}, video_BTHWC[:, 5:], mutable=["cache"])
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from stvdm import sharding
from stvdm.sharding import partitioned

Triple = tuple[int, int, int]  # along time, height, width

_SIDES = (("rows", 1), ("columns", 2))  # of frames: logical name, and axis among (time, height, width)
_SMALLEST_MEAN_SQUARE = 1e-8  # bounds the norm's slope at 0; above it the norm is exact


class RMSNorm(nn.Module):
    """x / rms(x) * gamma over the channels of each position, in float32: Wan's L2 norm times sqrt(channels)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gamma = self.param("gamma", partitioned(nn.initializers.ones, "channels"), (x.shape[-1],))
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(x * x, axis=-1, keepdims=True)
        return x * lax.rsqrt(jnp.maximum(mean_square, _SMALLEST_MEAN_SQUARE)) * gamma


class CausalConv(nn.Module):
    """A convolution whose output at a time sees that time and those before it; in space zero-padded around.

    Before the first frame stand zeros, or ``past``. When the collection "cache" is mutable (streaming), the inputs
    that the next chunk will look back at are left there, and found there by the next call.
    """

    features: int
    kernel: Triple
    stride: Triple = (1, 1, 1)
    zero: bool = False  # start as zero: a residual branch that is switched on by training
    bias_init: Callable[..., jax.Array] = nn.initializers.zeros
    dtype: Any = jnp.float32

    def has_past(self) -> bool:
        """Whether a chunk came before this one."""
        return self.has_variable("cache", "past")

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array, past: jax.Array | None = None) -> jax.Array:
        x = x_BTHWC.astype(self.dtype)
        if num_past := self.kernel[0] - self.stride[0]:
            if self.has_past():
                past = self.get_variable("cache", "past")
            if past is None:
                x = jnp.pad(x, ((0, 0), (num_past, 0), (0, 0), (0, 0), (0, 0)))
            else:
                x = jnp.concatenate([past.astype(self.dtype), x], axis=1)
            if self.is_mutable_collection("cache") and not self.is_initializing():
                self.put_variable("cache", "past", x[:, x.shape[1] - num_past :])
        init = nn.initializers.zeros if self.zero else nn.initializers.lecun_normal()
        shape = (*self.kernel, x.shape[-1], self.features)
        kernel = self.param("kernel", partitioned(init, None, None, None, None, "channels"), shape)
        bias = self.param("bias", partitioned(self.bias_init, "channels"), (self.features,))
        return _convolve(x, kernel.astype(self.dtype), self.stride) + bias.astype(self.dtype)


def _split(x: jax.Array, stride: Triple) -> tuple[str | None, ...]:
    """How frames lie on the mesh, before and after: neighbours exchange the borders that a convolution sees.

    Where a device would keep fewer than two rows or columns of the result, each has all of both. What is left to the
    compiler it may split by taps, and if the result is not split as the frames are, it then sums wrongly (XLA of jax
    0.10: 3x3 with stride 2 on 4 columns over 2 or 4 devices). So it does where one of them alone is split: the gradient
    for the kernel comes out as many times too large as the other's axis has devices.
    """
    parts = [(x.shape[1 + axis] // stride[axis], sharding.num_parts(name)) for name, axis in _SIDES]
    is_small = any(num_parts > 1 and size // num_parts < 2 for size, num_parts in parts)
    return ("batch", None, *(None if is_small else name for name, _ in _SIDES), None)


def _convolve(x: jax.Array, kernel: jax.Array, stride: Triple) -> jax.Array:
    """Convolution, valid in time, zero-padded in space, by whichever exact arrangement the backend is quick at."""
    taps, height, width = kernel.shape[:3]
    if (height, width) == (1, 1):  # along time only: a sum of products over channels
        return _sum(_every(x, i, taps, stride[0]) @ kernel[i, 0, 0] for i in range(taps))
    split = _split(x, stride)
    return sharding.constrain(_convolve_space(sharding.constrain(x, *split), kernel, stride), *split)


def _convolve_space(x: jax.Array, kernel: jax.Array, stride: Triple) -> jax.Array:
    """`_convolve` with a kernel that sees neighbours in space."""
    taps, height, width = kernel.shape[:3]
    if taps == 1:
        return _convolve_frames(x, kernel[0], stride[1])
    if sharding.platform() == "cpu":  # XLA's 3-D convolution is slow there: what all taps meet, in one 2-D convolution
        met = jnp.concatenate([_every(x, i, taps, stride[0]) for i in range(taps)], axis=-1)
        return _convolve_frames(met, jnp.moveaxis(kernel, 0, 2).reshape(height, width, -1, kernel.shape[-1]), stride[1])
    dimensions = ("NDHWC", "DHWIO", "NDHWC")
    space = _padding(stride[1])
    return lax.conv_general_dilated(x, kernel, stride, ((0, 0), space, space), dimension_numbers=dimensions)


def _every(x: jax.Array, tap: int, taps: int, stride: int) -> jax.Array:
    """The frames that one tap of a time convolution meets."""
    return x[:, tap : x.shape[1] - taps + tap + 1 : stride]


def _convolve_frames(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """3x3 convolution of each frame, zero-padded around; right and below only with stride 2."""
    B, T, H, W, C = x.shape
    frames, dimensions = x.reshape(B * T, H, W, C), ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(
        frames, kernel, (stride, stride), (_padding(stride),) * 2, dimension_numbers=dimensions
    )
    return y.reshape(B, T, *y.shape[1:])


def _padding(stride: int) -> tuple[int, int]:
    return (1, 1) if stride == 1 else (0, 1)


def _sum(arrays: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(operator.add, arrays)
