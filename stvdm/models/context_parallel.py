# SPDX-License-Identifier: Apache-2.0
"""Attention of clips that lie in pieces on the devices of the mesh: each has some heads, or some tokens, of some clips.

Clips and heads never meet in attention, so that splitting over them needs no communication. Tokens do. Where they are
split over an axis of c devices, c = u r:

    all-to-all (Ulysses, arXiv:2309.14509)   groups of u devices exchange: all tokens of the group, a part of the heads
    ring (arXiv:2310.01889)                  keys and values go round the r groups, each device adds what it sees

The all-to-all moves less and lets patterns skip blocks, so u is the largest divisor of c that divides a device's heads,
and the ring takes the rest. Topology doesn't change that: the axis never leaves a slice, and if its devices are
a ring of links, an all-to-all of queries, keys, values and results by the shortest ways sends half a sequence over each
link (c^2/8 pairs, 4/c^2 each), while keys and values that go round one way send two. A sequence that does not divide is
filled up with tokens that nobody sees.

What a pattern saves on a ring is arithmetic alone. Keys and values go all the way round, also past those who see none
of them ("frame", "window"). All wait for the busiest: under "block_causal" the last group sees something at every step,
so that the whole takes as long as "full". And "time" sees something in every block: it costs what "full" does.

    out_BNAd = attend(q_BNAd, k_BNAd, v_BNAd, None, pattern=Pattern("full", (21, 30, 52)))
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, PartitionSpec

from stvdm import sharding
from stvdm.models import attention_kernels as kernels
from stvdm.models.patterns import Pattern

KeyValue = tuple[jax.Array, jax.Array]


class Text(NamedTuple):
    """Text that every token sees, in the same softmax; where it has queries too, it looks as well."""

    k_BSAd: jax.Array
    v_BSAd: jax.Array
    mask_BS: jax.Array | None = None  # True where a text token is real; None: all are
    q_BSAd: jax.Array | None = None
    sees_video: bool = True


@dataclasses.dataclass(frozen=True)
class _Split:
    """How tokens lie on an axis: ``ulysses`` devices exchange heads, ``ring`` such groups pass keys round."""

    axis: str = "context"
    ulysses: int = 1
    ring: int = 1

    @property
    def groups(self) -> list[list[int]]:
        return [[r * self.ulysses + u for u in range(self.ulysses)] for r in range(self.ring)]


def split_context(size: int, num_heads: int) -> tuple[int, int]:
    """(all-to-all, ring): what the c devices of an axis do, each with this many heads."""
    ulysses = max(u for u in range(1, size + 1) if size % u == 0 and num_heads % u == 0)
    return ulysses, size // ulysses


def attend(
    q_BNAd: jax.Array,
    video: KeyValue | None,
    text: Text | None,
    *,
    pattern: Pattern | None = None,
    backend: str,
) -> tuple[jax.Array, jax.Array | None]:
    """(out_BNAd, the text's out_BSAd or None): attention of a clip's tokens to its own keys and to its text's.

    Clips are split over as many of the batch's mesh axes, from the first, as divide them; over the others all do the
    same. So a clip alone is not refused.

    Args:
      video: (k_BNAd, v_BNAd); None: the text alone is looked at.
      pattern: which tokens of the video see which; of as many tokens as there are.
      backend: of `attention_kernels.forward`, or "cudnn" for what that can do, and "xla" for the rest.

    Raises:
      ValueError: if the heads do not divide over their mesh axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return _attend_local(_Split(), backend, pattern, q_BNAd, video, text)

    B, N, A, _ = q_BNAd.shape
    batch, tokens, heads, _ = sharding.spec("batch", "tokens", "heads", None)
    batch = next(batch[:n] or None for n in range(len(batch), -1, -1) if B % sharding.num_devices(mesh, batch[:n]) == 0)
    num_pieces, num_parts = sharding.num_devices(mesh, tokens), sharding.num_devices(mesh, heads)
    if A % num_parts:
        raise ValueError(
            f"num_heads={A}: heads are split over the {num_parts} devices of mesh axis {heads!r}; "
            f"use a multiple of {num_parts}, or a size of that axis that divides {A}."
        )
    ulysses, ring = split_context(num_pieces, A // num_parts)
    split = _Split(str(tokens), ulysses, ring)
    by_token, by_head = PartitionSpec(batch, tokens, heads, None), PartitionSpec(batch, None, heads, None)

    def fill_up(x_BNAd: jax.Array) -> jax.Array:
        return jnp.pad(x_BNAd, ((0, 0), (0, -N % num_pieces), (0, 0), (0, 0)))

    text_specs = dict(k_BSAd=by_head, v_BSAd=by_head, mask_BS=PartitionSpec(batch, None), q_BSAd=by_head)
    text_arrays = {} if text is None else {name: x for name in text_specs if (x := getattr(text, name)) is not None}
    out, text_out = jax.shard_map(
        lambda q, video, arrays: _attend_local(split, backend, pattern, q, video, text and text._replace(**arrays)),
        in_specs=(by_token, None if video is None else by_token, {name: text_specs[name] for name in text_arrays}),
        out_specs=(by_token, None if text is None or text.q_BSAd is None else by_head),
        check_vma=False,
    )(
        fill_up(q_BNAd),
        None if video is None else tuple(fill_up(x) for x in video),
        text_arrays,
    )
    return out[:, :N], text_out


def attend_unsplit(q_BnAd: jax.Array, k_BnAd: jax.Array, v_BnAd: jax.Array) -> jax.Array:
    """out_BnAd where all see all, in plain XLA: its compiler splits it over a mesh like everything around it."""
    return _merged(_Set("xla"), q_BnAd, (k_BnAd, v_BnAd), None, None)


def _attend_local(
    split: _Split,
    backend: str,
    pattern: Pattern | None,
    q: jax.Array,
    video: KeyValue | None,
    text: Text | None,
) -> tuple[jax.Array, jax.Array | None]:
    """`attend` on one device, with its part of the arrays."""
    if video is None or pattern is None:
        assert text is not None and text.q_BSAd is None
        return _softmax(_Set(backend), q, None, (text.k_BSAd, text.v_BSAd), text.mask_BS), None

    k, v = video
    exchange = functools.partial(jax.lax.all_to_all, axis_name=split.axis, axis_index_groups=split.groups, tiled=True)
    if split.ulysses > 1:
        q, k, v = (exchange(x, split_axis=2, concat_axis=1) for x in (q, k, v))
        text = text and _heads_of_this_device(split, text)
    text_kv, text_mask = text and (text.k_BSAd, text.v_BSAd), text and text.mask_BS
    num_here = q.shape[1]
    if split.ring == 1:  # all tokens are here: what the sequence was filled up with can go
        q, k, v = (x[:, : pattern.num_tokens] for x in (q, k, v))
    around = _Set(backend, pattern, split.ring, split.axis, split.ulysses)
    out = _softmax(around, q, (k, v), text_kv, text_mask)
    out = jnp.pad(out, ((0, 0), (0, num_here - out.shape[1]), (0, 0), (0, 0)))

    text_out = None
    if text is not None and text.q_BSAd is not None:
        all_see = dataclasses.replace(around, pattern=Pattern("full", pattern.grid))
        text_out = _softmax(all_see, text.q_BSAd, (k, v) if text.sees_video else None, text_kv, text_mask)
    if split.ulysses > 1:
        out = exchange(out, split_axis=1, concat_axis=2)
        if text_out is not None:
            text_out = jax.lax.all_gather(text_out, split.axis, axis=2, axis_index_groups=split.groups, tiled=True)
    return out, text_out


def _heads_of_this_device(split: _Split, text: Text) -> Text:
    """The part of the text's heads that this device has after the all-to-all."""

    def part(x_BSAd: jax.Array) -> jax.Array:
        num = x_BSAd.shape[2] // split.ulysses
        return jax.lax.dynamic_slice_in_dim(x_BSAd, jax.lax.axis_index(split.axis) % split.ulysses * num, num, axis=2)

    q_BSAd = None if text.q_BSAd is None else part(text.q_BSAd)
    return text._replace(k_BSAd=part(text.k_BSAd), v_BSAd=part(text.v_BSAd), q_BSAd=q_BSAd)


@dataclasses.dataclass(frozen=True)
class _Set:
    """What `_softmax` must know while it is traced."""

    backend: str
    pattern: Pattern | None = None
    ring: int = 1
    axis: str = "context"
    stride: int = 1  # devices from one member of the ring to the next

    def starts(self, step: Any, num_queries: int, num_keys: int) -> tuple[Any, Any]:
        """The numbers of the first query and of the first key in a step of the ring."""
        if self.ring == 1 or self.pattern is None:
            return 0, 0
        here = jax.lax.axis_index(self.axis) // self.stride
        return here * num_queries, (here - step) % self.ring * num_keys

    def pass_on(self, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        size = self.ring * self.stride
        around = [(i, (i + self.stride) % size) for i in range(size)]
        return tuple(jax.lax.ppermute(x, self.axis, around) for x in arrays)


def _softmax(
    how: _Set, q: jax.Array, video_kv: KeyValue | None, text_kv: KeyValue | None, text_mask: jax.Array | None
) -> jax.Array:
    """One softmax over the video's keys, wherever they are on the ring, and the text's."""
    every = how.pattern is not None and how.pattern.kind == "full" and how.pattern.num_tokens
    if video_kv is not None and video_kv[0].shape[1] * how.ring == every:
        how = dataclasses.replace(how, pattern=None)  # nothing was filled up, so that nothing is to be hidden
    if how.backend == "cudnn":  # without the name that `_merged` gives: its backward pass needs more than the result
        if how.ring == 1 and text_kv is None and video_kv is not None:
            dot = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
            if how.pattern is None:
                return dot(q, *video_kv)
            if how.pattern.falls_apart:
                return how.pattern.join(dot(*(how.pattern.split(x) for x in (q, *video_kv))))
        how = dataclasses.replace(how, backend="xla")
    return _merged(how, q, video_kv, text_kv, text_mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _merged(how: _Set, q: jax.Array, video_kv: Any, text_kv: Any, text_mask: jax.Array | None) -> jax.Array:
    return _merged_forward(how, q, video_kv, text_kv, text_mask)[0]


def _merged_forward(how: _Set, q: jax.Array, video_kv: Any, text_kv: Any, text_mask: Any) -> tuple[jax.Array, Any]:
    found: Any = None
    if text_kv is not None:
        found = kernels.forward(how.backend, q, text_kv[0], text_kv[1], text_mask)
    if video_kv is not None:

        def add(found: Any, k: jax.Array, v: jax.Array, step: Any) -> Any:
            starts = how.starts(step, q.shape[1], k.shape[1])
            part = kernels.forward(how.backend, q, k, v, None, how.pattern, starts)
            return part if found is None else kernels.merge(found, part)

        def one_step(carry: Any, step: jax.Array) -> tuple[Any, None]:
            found, k, v = carry
            return (add(found, k, v, step), *how.pass_on(k, v)), None

        k, v = video_kv
        if how.ring > 1:
            if found is None:
                nothing = jnp.full((q.shape[0], q.shape[2], q.shape[1]), kernels.NOTHING, jnp.float32)
                found = jnp.zeros(q.shape, jnp.float32), nothing
            (found, k, v), _ = jax.lax.scan(one_step, (found, k, v), jnp.arange(how.ring - 1))
        found = add(found, k, v, how.ring - 1)
    out, lse = found[0].astype(q.dtype), found[1]
    if video_kv is not None:
        # Both carry the name, so that who keeps "attention" for the backward pass need not run the kernel again. The
        # text alone is soon looked at again.
        out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "attention")
    return out, (q, video_kv, text_kv, text_mask, out, lse)


def _merged_backward(how: _Set, kept: Any, dout: jax.Array) -> tuple[Any, ...]:
    q, video_kv, text_kv, text_mask, out, lse = kept
    dq: Any = jnp.zeros(q.shape, jnp.float32)
    dvideo = dtext = None

    def like(gradients: Any, arrays: Any) -> Any:
        return jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), gradients, arrays)

    if text_kv is not None:
        dq, dk, dv = kernels.backward(how.backend, q, text_kv[0], text_kv[1], text_mask, None, (0, 0), out, lse, dout)
        dtext = like((dk, dv), text_kv)
    if video_kv is not None:

        def add(sums: Any, k: jax.Array, v: jax.Array, step: Any) -> Any:
            starts = how.starts(step, q.shape[1], k.shape[1])
            part = kernels.backward(how.backend, q, k, v, None, how.pattern, starts, out, lse, dout)
            return jax.tree.map(jnp.add, sums, part)

        def one_step(carry: Any, step: jax.Array) -> tuple[Any, None]:
            (dq, dk, dv), k, v = carry
            # The sums follow their keys a step behind, so that they travel while the next are computed.
            return (add((dq, *how.pass_on(dk, dv)), k, v, step), *how.pass_on(k, v)), None

        k, v = video_kv
        sums = dq, jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
        if how.ring > 1:
            (sums, k, v), _ = jax.lax.scan(one_step, (sums, k, v), jnp.arange(how.ring - 1))
            sums = sums[0], *how.pass_on(*sums[1:])
        dq, dk, dv = add(sums, k, v, how.ring - 1)
        if how.ring > 1:  # one step further and they are home
            dk, dv = how.pass_on(dk, dv)
        dvideo = like((dk, dv), video_kv)
    return like(dq, q), dvideo, dtext, None


_merged.defvjp(_merged_forward, _merged_backward)
