# SPDX-License-Identifier: Apache-2.0
"""Collectives that were put into a program are found in it again: kind, mesh axes, how often, how many bytes."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from stvdm import sharding
from stvdm.planning.collectives import _axes_of, collectives_of


def program(body, mesh):
    spec = P(("data", "fsdp"))
    function = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    return function.lower(jnp.zeros((64, 16), jnp.float32)).compile().as_text()


def test_each_kind_with_its_axes_and_bytes():
    mesh = sharding.make_mesh(data=2, fsdp=4)
    size = 64 * 16 * 4 / 8  # bytes of one device's part

    def body(x):
        x = jax.lax.psum(x, "fsdp")
        x = jax.lax.ppermute(x * 2, "data", [(0, 1), (1, 0)])
        return jax.lax.all_gather(x * 3, "fsdp", tiled=True)[:8]

    found = {(c.kind, c.axes): c for c in collectives_of(program(body, mesh), mesh)}
    assert found["all-reduce", ("fsdp",)][2:] == (1, 2 * 3 / 4 * size)
    assert found["collective-permute", ("data",)][2:] == (1, size)
    assert found["all-gather", ("fsdp",)][2:] == (1, 3 / 4 * 4 * size)


def test_loops_are_multiplied_out():
    mesh = sharding.make_mesh(data=2, fsdp=4)

    def body(x):
        return jax.lax.scan(lambda c, _: (jnp.sin(jax.lax.psum(c, "data")), None), x, length=7)[0]

    (found,) = collectives_of(program(body, mesh), mesh)
    assert found[:3] == ("all-reduce", ("data",), 7)
    assert found.bytes == 7 * 2 * 1 / 2 * 64 * 16 * 4 / 8


@pytest.mark.parametrize(
    ("groups", "axes", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", ("fsdp",), 4),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("data",), 2),
        ("replica_groups=[2,4]<=[8]", ("fsdp",), 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",), 2),
        ("replica_groups=[1,8]<=[8]", ("data", "fsdp"), 8),
        ("replica_groups={}", ("data", "fsdp"), 8),
        ("source_target_pairs={{0,1},{1,2},{2,3},{3,0}}", ("fsdp",), 2),
    ],
)
def test_groups_of_devices_are_told_as_mesh_axes(groups, axes, size):
    assert _axes_of(f"x = f32[8] all-reduce(y), {groups}", sharding.make_mesh(data=2, fsdp=4)) == (axes, size)
