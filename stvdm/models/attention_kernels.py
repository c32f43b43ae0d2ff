# SPDX-License-Identifier: Apache-2.0
"""Softmax attention to one set of keys, as a mean and a log-sum-exp, so that sets can be merged and passed around.

    out_n = Σ_m p_nm v_m,    lse_n = log Σ_m exp(s_nm),    p_nm = exp(s_nm - lse_n),    s_nm = q_n · k_m / √d

over the keys that a query may see. Given the lse and the mean over *all* sets, the gradient is a sum over sets
(FlashAttention-2, arXiv:2307.08691):

    ds_nm = p_nm (dout_n · v_m - dout_n · out_n),
    dq = Σ_m ds_nm k_m / √d,    dk = Σ_n ds_nm q_n / √d,    dv = Σ_n p_nm dout_n

Two backends do the same: "splash", the TPU kernel of JAX, and "xla", which never holds more than a block of scores, for
everything else and for short sequences. A block that a pattern leaves out is neither computed nor, by "splash", copied.
It still is a step that does nothing where the numbers are traced, and in rows with fewer blocks than the fullest.

    out, lse = forward("splash", q_BnAd, k_BmAd, v_BmAd, valid_Bm, pattern)
    dq, dk, dv = backward("splash", q_BnAd, k_BmAd, v_BmAd, valid_Bm, pattern, (0, 0), out, lse, dout_BnAd)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stvdm.models.patterns import Pattern

NOTHING = -1e30  # a score that is not seen, and the lse of a query without keys: finite, so that no difference is NaN
XLA_BLOCK = 1024
SPLASH_BLOCKS = (512, 384, 256, 128)
SPLASH_OVERHEAD = 256  # what a block costs beside its arithmetic, in rows of it: a guess, not measured on a TPU
SHORT = 256  # up to here XLA is given what is for "splash", which would fill it up to blocks of 128 and heads to 128
_LANES = 128

Starts = tuple[Any, Any]  # the numbers that the first query and the first key have in the pattern; may be traced
_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def forward(
    backend: str,
    q_BnAd: jax.Array,
    k_BmAd: jax.Array,
    v_BmAd: jax.Array,
    valid_Bm: jax.Array | None = None,
    pattern: Pattern | None = None,
    starts: Starts = (0, 0),
) -> tuple[jax.Array, jax.Array]:
    """(out_BnAd, lse_BAn), both float32; zeros and `NOTHING` for a query that sees no key.

    Args:
      backend: "xla"; "splash"; or "splash_interpreted", the TPU kernel run without a TPU, for tests.
      valid_Bm: True where a key is real; None: all are.
      pattern: who sees whom, by number; None: all see all.
      starts: the numbers of the first query and of the first key in the pattern.
    """
    n, m = q_BnAd.shape[1], k_BmAd.shape[1]
    if pattern is not None and _falls_apart(pattern, valid_Bm, starts, n, m):
        out, lse = forward(backend, *(pattern.split(x) for x in (q_BnAd, k_BmAd, v_BmAd)))
        return pattern.join(out), pattern.join(lse.swapaxes(1, 2)).swapaxes(1, 2)

    compute: Any = functools.partial(_splash_forward, backend) if _is_splash(backend, n, m) else _xla_forward
    with _scope(pattern):
        out, lse = compute(*_heads_first(q_BnAd, k_BmAd, v_BmAd), valid_Bm, pattern, starts)
    seen = _sees_something(lse)
    out, lse = jnp.where(seen[..., None], out, 0.0), jnp.where(seen, lse, NOTHING)
    return out.swapaxes(1, 2), lse


def backward(
    backend: str,
    q_BnAd: jax.Array,
    k_BmAd: jax.Array,
    v_BmAd: jax.Array,
    valid_Bm: jax.Array | None,
    pattern: Pattern | None,
    starts: Starts,
    out_BnAd: jax.Array,
    lse_BAn: jax.Array,
    dout_BnAd: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dq, dk, dv), float32: this set's part in the gradient of a mean ``out`` that has this ``lse`` over all sets."""
    n, m = q_BnAd.shape[1], k_BmAd.shape[1]
    if pattern is not None and _falls_apart(pattern, valid_Bm, starts, n, m):
        q, k, v, out, dout = (pattern.split(x) for x in (q_BnAd, k_BmAd, v_BmAd, out_BnAd, dout_BnAd))
        lse = pattern.split(lse_BAn.swapaxes(1, 2)).swapaxes(1, 2)
        dq, dk, dv = backward(backend, q, k, v, None, None, (0, 0), out, lse, dout)
        return pattern.join(dq), pattern.join(dk), pattern.join(dv)

    compute: Any = functools.partial(_splash_backward, backend) if _is_splash(backend, n, m) else _xla_backward
    # A query without any key gets zeros, whatever the keys are.
    seen = _sees_something(lse_BAn)
    lse_BAn = jnp.where(seen, lse_BAn, 0.0)
    q, k, v, out, dout = _heads_first(q_BnAd, k_BmAd, v_BmAd, out_BnAd, dout_BnAd)
    dout = jnp.where(seen[..., None], dout, 0.0).astype(dout.dtype)
    with _scope(pattern):
        dq, dk, dv = _heads_first(*compute(q, k, v, valid_Bm, pattern, starts, out, lse_BAn, dout))
    return dq, dk, dv


def share_computed(pattern: Pattern) -> float:
    """Of all pairs of tokens, those that "splash" computes where all are on one device: those of whole blocks.

    A window sees few of a block's pairs, and blocks are runs of tokens in raster order: at 21 x 30 x 52 tokens a
    window of (1, 4, 4) sees 0.6 % of all pairs and touches blocks with 16 % of them. On a ring it is no less.
    """
    if pattern.falls_apart:
        return pattern.share
    n = pattern.num_tokens
    return pattern.computed(_splash_block(n) if n > SHORT else n)


def merge(one: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The (out_BnAd, lse_BAn) over two sets from those of each."""
    lse = jnp.logaddexp(one[1], other[1])
    share, rest = (jnp.exp(part - lse).swapaxes(1, 2)[..., None] for part in (one[1], other[1]))
    return one[0] * share + other[0] * rest, lse


def _falls_apart(pattern: Pattern, valid_Bm: jax.Array | None, starts: Starts, n: int, m: int) -> bool:
    """Whether all tokens are here, in groups that never meet: then each group is a clip of its own."""
    return pattern.falls_apart and valid_Bm is None and _are_known(starts) and n == m == pattern.num_tokens


def _are_known(starts: Starts) -> bool:
    return isinstance(starts[0], int) and isinstance(starts[1], int)


def _is_splash(backend: str, n: int, m: int) -> bool:
    return backend != "xla" and max(n, m) > SHORT


def _scope(pattern: Pattern | None) -> Any:
    """A name around a kernel that says which share of all pairs is seen: for profiles, and for counting FLOPs."""
    return jax.named_scope("sees_all" if pattern is None else f"sees_{pattern.share:.6f}_of_all")


def _sees_something(lse: jax.Array) -> jax.Array:
    return lse > -1e20


def _heads_first(*arrays_BnAd: jax.Array) -> tuple[jax.Array, ...]:
    # Heads before tokens, once and in the open: XLA's batched products on CPU are twice as fast that way.
    return tuple(x.swapaxes(1, 2) for x in arrays_BnAd)


# ---- XLA: queries and keys in blocks --------------------------------------------------------------------------------


def _xla_forward(q: Any, k: Any, v: Any, valid_Bm: Any, pattern: Pattern | None, starts: Starts) -> Any:
    """From heads-first arrays: (out_BAnd, lse_BAn)."""
    keys, scale = _key_blocks(k, v, valid_Bm), q.shape[-1] ** -0.5

    def one_block_of_queries(i: Any, q: jax.Array) -> tuple[jax.Array, jax.Array]:
        def add(carry: Any, j: Any, k: jax.Array, v: jax.Array, valid: jax.Array) -> Any:
            largest, total, out = carry
            scores = _scores(q, k, valid, pattern, starts, i, j)
            new = jnp.maximum(largest, scores.max(axis=-1, keepdims=True))
            weight, shrink = jnp.exp((scores - new) * scale), jnp.exp((largest - new) * scale)
            out = out * shrink + _dot("BAnm,BAmd->BAnd", weight.astype(v.dtype), v)
            return new, total * shrink + weight.sum(axis=-1, keepdims=True), out

        start = jnp.full((*q.shape[:3], 1), NOTHING), jnp.zeros((*q.shape[:3], 1)), jnp.zeros(q.shape, jnp.float32)
        largest, total, out = _fold_keys(add, start, keys, pattern, starts, i, q.shape[2])
        return out / jnp.where(total > 0, total, 1.0), (largest * scale + jnp.log(jnp.maximum(total, 1e-37)))[..., 0]

    queries = _blocks(q)
    if len(queries) == 1:
        out, lse = one_block_of_queries(0, queries[0])
        return out, lse
    out, lse = jax.lax.map(lambda x: one_block_of_queries(*x), (jnp.arange(len(queries)), queries))
    return _unblock(out, q.shape[2]), _unblock(lse, q.shape[2])


def _xla_backward(
    q: Any, k: Any, v: Any, valid_Bm: Any, pattern: Pattern | None, starts: Starts, out: Any, lse: Any, dout: Any
) -> Any:
    """From heads-first arrays: (dq, dk, dv)."""
    scale = q.shape[-1] ** -0.5
    inner = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(axis=-1)
    queries = tuple(_blocks(x) for x in (q, dout, lse, inner))
    dq = jnp.zeros(queries[0].shape, jnp.float32)

    def one_block_of_keys(dq: jax.Array, xs: Any) -> Any:
        j, k, v, valid = xs

        def one_block_of_queries(carry: Any, xs: Any) -> Any:
            i, dq, q, dout, lse, inner = xs

            def add(carry: Any) -> Any:
                dk, dv, dq = carry
                weight = jnp.exp(_scores(q, k, valid, pattern, starts, i, j) * scale - lse[..., None])
                change = weight * (_dot("BAnd,BAmd->BAnm", dout, v) - inner[..., None]) * scale
                weight, change = weight.astype(q.dtype), change.astype(q.dtype)
                # Sums over queries with the small factor first: XLA's CPU products take a quarter of the time so.
                return (
                    dk + _dot("BAnd,BAnm->BAdm", q, change).swapaxes(2, 3),
                    dv + _dot("BAnd,BAnm->BAdm", dout, weight).swapaxes(2, 3),
                    dq + _dot("BAnm,BAmd->BAnd", change, k),
                )

            *carry, dq = _if_touched(add, (*carry, dq), pattern, starts, i, j, q.shape[2], k.shape[2])
            return tuple(carry), dq

        start = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
        (dk, dv), dq = _scan(one_block_of_queries, start, (jnp.arange(len(dq)), dq, *queries))
        return dq, (dk, dv)

    keys = _key_blocks(k, v, valid_Bm)
    dq, (dk, dv) = _scan(one_block_of_keys, dq, (jnp.arange(len(keys[0])), *keys))
    return _unblock(dq, q.shape[2]), _unblock(dk, k.shape[2]), _unblock(dv, v.shape[2])


def _scores(
    q: jax.Array, k: jax.Array, valid: jax.Array | None, pattern: Pattern | None, starts: Starts, i: Any, j: Any
) -> jax.Array:
    """Products of block i of the queries with block j of the keys, `NOTHING` where a key is not seen."""
    scores = _dot("BAnd,BAmd->BAnm", q, k)
    if valid is not None:
        scores = jnp.where(valid[:, None, None, :], scores, NOTHING)
    if pattern is not None:
        query, key = (
            starts[0] + i * q.shape[2] + jnp.arange(q.shape[2]),
            starts[1] + j * k.shape[2] + jnp.arange(k.shape[2]),
        )
        scores = jnp.where(pattern.sees(query[:, None], key[None, :]), scores, NOTHING)
    return scores


def _fold_keys(
    add: Callable[..., Any], start: Any, keys: Any, pattern: Pattern | None, starts: Starts, i: Any, n: int
) -> Any:
    """``add(carry, j, k, v, valid)`` over the blocks of keys that any query of block i may see."""
    size = keys[0].shape[3]

    def one(carry: Any, xs: Any) -> Any:
        return _if_touched(lambda carry: add(carry, *xs), carry, pattern, starts, i, xs[0], n, size), None

    return _scan(one, start, (jnp.arange(len(keys[0])), *keys))[0]


def _if_touched(
    compute: Callable[[Any], Any], carry: Any, pattern: Pattern | None, starts: Starts, i: Any, j: Any, n: int, m: int
) -> Any:
    if pattern is None:
        return compute(carry)
    query, key = starts[0] + i * n, starts[1] + j * m
    touched = pattern.touches(query, query + n - 1, key, key + m - 1)
    return jax.lax.cond(touched, compute, lambda carry: carry, carry)


def _scan(body: Callable[..., Any], start: Any, xs: Any) -> Any:
    """`lax.scan`, without a loop where there is one step."""
    if len(xs[0]) > 1:
        return jax.lax.scan(body, start, xs)
    carry, y = body(start, jax.tree.map(lambda x: x[0], xs))
    return carry, jax.tree.map(lambda leaf: leaf[None], y)


def _blocks(x: jax.Array) -> jax.Array:
    """(B, A, n, ...) to (blocks, B, A, size, ...), filled up with zeros."""
    n = x.shape[2]
    num = -(-n // XLA_BLOCK)
    size = -(-n // num)
    x = jnp.pad(x, [(0, num * size - n) if axis == 2 else (0, 0) for axis in range(x.ndim)])
    return jnp.moveaxis(x.reshape(*x.shape[:2], num, size, *x.shape[3:]), 2, 0)


def _unblock(x: jax.Array, n: int) -> jax.Array:
    """(blocks, B, A, size, ...) to (B, A, n, ...)."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, :n]


def _key_blocks(
    k: jax.Array, v: jax.Array, valid_Bm: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Blocks of keys, of values, and (blocks, B or 1, size) of which keys are real; None: all are."""
    keys, num_keys = _blocks(k), k.shape[2]
    if valid_Bm is None and keys.shape[0] * keys.shape[3] == num_keys:
        return keys, _blocks(v), None
    valid_Bm = jnp.ones((1, num_keys), jnp.bool_) if valid_Bm is None else valid_Bm
    return keys, _blocks(v), _blocks(valid_Bm[:, None])[:, :, 0]


# ---- splash: the TPU kernel -----------------------------------------------------------------------------------------


def _splash_forward(
    backend: str, q: Any, k: Any, v: Any, valid_Bm: Any, pattern: Pattern | None, starts: Starts
) -> Any:
    """From heads-first arrays: (out_BAnd, lse_BAn)."""
    call = _SplashCall(backend, q.shape, k.shape, valid_Bm, pattern, starts)

    def one_clip(q: Any, k: Any, v: Any, segments: Any) -> Any:
        options = dict(zip(_OPTIONS, call.options, strict=True)) | {"save_residuals": True}
        out, (lse,) = call.library._splash_attention_forward(call.mask(), q, k, v, segments, None, **options)
        return out, lse

    out, lse = call.over_clips(one_clip, q * q.shape[-1] ** -0.5, k, v)
    return out[:, :, : q.shape[2], : q.shape[3]].astype(jnp.float32), lse[:, :, : q.shape[2]]


def _splash_backward(
    backend: str,
    q: Any,
    k: Any,
    v: Any,
    valid_Bm: Any,
    pattern: Pattern | None,
    starts: Starts,
    out: Any,
    lse: Any,
    dout: Any,
) -> Any:
    """From heads-first arrays: (dq, dk, dv)."""
    call = _SplashCall(backend, q.shape, k.shape, valid_Bm, pattern, starts)
    scale = q.shape[-1] ** -0.5

    def one_clip(q: Any, k: Any, v: Any, segments: Any, out: Any, lse: Any, dout: Any) -> Any:
        kept = (q, k, v, segments, None, out, lse, call.mask(), call.mask(by_key=True))
        return call.library._splash_attention_bwd(*call.options, kept, dout)[3:6]

    dq, dk, dv = call.over_clips(one_clip, q * scale, k, v, out, lse, dout)
    n, m, d = q.shape[2], k.shape[2], q.shape[3]
    dq = dq[:, :, :n, :d].astype(jnp.float32) * scale
    return dq, dk[:, :, :m, :d].astype(jnp.float32), dv[:, :, :m, :d].astype(jnp.float32)


# The settings of the library's functions, in the order in which its backward function takes them.
_OPTIONS = (
    *("save_residuals", "mask_value", "is_mqa", "block_sizes", "residual_checkpoint_name"),
    *("mask_function", "attn_logits_soft_cap", "interpret"),
)


class _SplashCall:
    """One use of the kernel: sizes filled up to blocks, the pattern told block by block.

    Its own `custom_vjp` knows one set of keys; with the mean and the log-sum-exp over all sets its backward function
    gives this set's part, so the two halves are called here by themselves.
    """

    def __init__(
        self,
        backend: str,
        q_shape: tuple[int, ...],
        k_shape: tuple[int, ...],
        valid_Bm: jax.Array | None,
        pattern: Pattern | None,
        starts: Starts,
    ) -> None:
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as masks

        self.library, self._masks, self._pattern, self._starts = library, masks, pattern, starts
        self._n, self._m = q_shape[2], k_shape[2]
        self._q_block, self._k_block = _splash_block(self._n), _splash_block(self._m)
        num_padding = -self._m % self._k_block
        # Numbers past the clip's last token are hidden by the pattern.
        hidden = pattern is not None and _are_known(starts) and starts[1] + self._m >= pattern.num_tokens
        self._segments = None
        if valid_Bm is not None or (num_padding and not hidden):
            real_Bm = jnp.ones((q_shape[0], self._m), jnp.int32) if valid_Bm is None else valid_Bm.astype(jnp.int32)
            ones = jnp.ones((self._n + -self._n % self._q_block,), jnp.int32)
            self._segments = library.SegmentIds(ones, jnp.pad(real_Bm, ((0, 0), (0, num_padding))))
        sizes = library.BlockSizes(
            block_q=self._q_block,
            block_kv=self._k_block,
            block_q_dkv=self._q_block,
            block_kv_dkv=self._k_block,
            block_q_dq=self._q_block,
            block_kv_dq=self._k_block,
        )
        sees = None if pattern is None else functools.partial(_sees_by_code, pattern, self._m)
        interpret = backend == "splash_interpreted"
        self.options = (False, library.DEFAULT_MASK_VALUE, False, sizes, None, sees, None, interpret)

    def over_clips(self, function: Callable[..., Any], q: Any, k: Any, v: Any, *of_queries: Any) -> Any:
        """``function(q, k, v, segments, ...)`` of each clip's arrays, filled up with zeros to whole blocks."""
        segment_axes = None if self._segments is None else self.library.SegmentIds(None, 0)  # type: ignore[arg-type]
        q, *others = (_fill_up(x, self._q_block) for x in (q, *of_queries))
        k, v = (_fill_up(x, self._k_block) for x in (k, v))
        axes = (0, 0, 0, segment_axes, *(0 for _ in others))
        return jax.vmap(function, in_axes=axes)(q, k, v, self._segments, *others)

    def mask(self, *, by_key: bool = False) -> Any:
        """Which blocks of keys a block of queries goes through; ``by_key``: of queries a block of keys.

        Where the numbers are known they are listed densely, so that most blocks left out are not even steps of the
        grid. A step that is left out names the block before it, which is there and so is not copied again.
        """
        if self._pattern is None:
            return self._masks.MaskInfo(None, None, None, None, None)
        q_first = self._starts[0] + self._q_block * np.arange(-(-self._n // self._q_block))[:, None]
        k_first = self._starts[1] + self._k_block * np.arange(-(-self._m // self._k_block))[None, :]
        touched = self._pattern.touches(q_first, q_first + self._q_block - 1, k_first, k_first + self._k_block - 1)
        axis = 0 if by_key else 1
        shape = (q_first.shape[0], k_first.shape[1])
        which: Any = np.broadcast_to(np.expand_dims(np.arange(shape[axis], dtype=np.int32), 1 - axis), shape)
        touched = touched | (which < 0)  # of the full shape
        if isinstance(touched, np.ndarray):
            order = np.argsort(~touched, axis=axis, kind="stable")
            width = max(1, int(touched.sum(axis=axis).max()))
            touched, which = (np.take_along_axis(x, order, axis).take(np.arange(width), axis) for x in (touched, which))
        which = jax.lax.cummax(jnp.where(touched, which, 0), axis=axis)
        queries = self._starts[0] + jnp.arange(-(-self._n // self._q_block) * self._q_block, dtype=jnp.int32)
        code = _code(self._pattern, queries, self._starts[1], self._m)
        # Both tables lie in the little scalar memory.
        small = next(kind for kind in (jnp.int8, jnp.int16, jnp.int32) if shape[axis] <= jnp.iinfo(kind).max)
        return self._masks.MaskInfo(which.astype(small)[None], None, jnp.asarray(touched, jnp.int8)[None], None, code)


def _code(pattern: Pattern, query: jax.Array, key_start: Any, num_keys: int) -> Any:
    """The one number that the kernel carries for a query: as much of its answer as can be said before it meets keys.

    The kernel numbers its keys from 0. Where a query sees a run of keys that is the end, or the start, of that run;
    else the query's place, and which part of the clip's keys these are.
    """
    frame_start = query // pattern.tokens_per_frame * pattern.tokens_per_frame
    if pattern.kind == "full":
        return jnp.full_like(query, pattern.num_tokens - key_start)
    if pattern.kind == "block_causal":
        return jnp.minimum(frame_start + pattern.tokens_per_frame, pattern.num_tokens) - key_start
    if pattern.kind == "frame":
        return frame_start - key_start
    num_bits = [size.bit_length() for size in pattern.grid]
    assert sum(num_bits) + (pattern.num_tokens // num_keys + 1).bit_length() < 32, (pattern, num_keys)
    assert 2 * pattern.num_tokens < _EXACT, pattern
    frame, *others = pattern.place(query)
    code = jnp.full_like(query, key_start // num_keys)
    for part, bits in zip((jnp.minimum(frame, pattern.grid[0]), *others), num_bits, strict=True):
        code = code << bits | part
    return code


def _sees_by_code(pattern: Pattern, num_keys: int, code: jax.Array, key: jax.Array) -> jax.Array:
    """`Pattern.sees` as the kernel asks it, for each score: so without the division that a TPU's vector unit lacks."""
    if pattern.kind in ("full", "block_causal"):
        return key < code
    if pattern.kind == "frame":
        return (key >= code) & (key < code + pattern.tokens_per_frame)
    place = []
    for bits in (size.bit_length() for size in reversed(pattern.grid)):
        place.append(code & (2**bits - 1))
        code = code >> bits
    column, row, frame = place
    return pattern.place_sees((frame, row, column), pattern.place(key + code * num_keys, _divide))


_EXACT = 2**22  # numbers below it are divided exactly


def _divide(number: jax.Array, by: int) -> jax.Array:
    """number // by: half a unit keeps the quotient further from a whole number than float32 rounds."""
    return ((number.astype(jnp.float32) + 0.5) * (1.0 / by)).astype(jnp.int32)


def _splash_block(length: int) -> int:
    """The block that takes the least time: a large one is filled up further, a small one is soon done."""
    return min(SPLASH_BLOCKS, key=lambda size: (length + -length % size) ** 2 * (1 + SPLASH_OVERHEAD / size))


def _fill_up(x: jax.Array, block: int) -> jax.Array:
    """Zeros behind the tokens (B, A, n, ...) up to whole blocks, and behind a head's channels up to whole lanes."""
    channels = [(0, -size % _LANES) for size in x.shape[3:]]
    return jnp.pad(x, [(0, 0), (0, 0), (0, -x.shape[2] % block), *channels])
