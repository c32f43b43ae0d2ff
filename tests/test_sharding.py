# SPDX-License-Identifier: Apache-2.0
"""The table is strict, and an array lies where the table says."""

import importlib.util
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from stvdm import sharding


def test_every_rule_names_axes_of_the_mesh():
    for rule in sharding.AXIS_RULES.values():
        for axis in (rule,) if isinstance(rule, str) else rule or ():
            assert axis in sharding.MESH_AXES


def test_the_free_axis_takes_the_rest():
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}


@pytest.mark.parametrize(
    "axes", [dict(data=3), dict(data=-1, fsdp=-1), dict(data=1, fsdp=4), dict(data=-1, tensor=3), dict(fsdp=0)]
)
def test_a_mesh_that_does_not_fit_is_refused(axes):
    with pytest.raises(ValueError, match="mesh="):
        sharding.make_mesh(**axes)


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed: pip install -e '.[tpu]'"
)
def test_only_the_data_axis_goes_from_slice_to_slice():
    code = """
import numpy as np
from stvdm import sharding
from stvdm.planning import chips
devices = chips.topology("v5e:2x4", num_slices=2).devices
slices = np.vectorize(lambda device: device.slice_index)(sharding.make_mesh(fsdp=4, devices=devices).devices)
assert slices.shape == (4, 4, 1, 1)
assert slices[:2].max() == 0 and slices[2:].min() == 1, slices
try:
    sharding.make_mesh(data=1, fsdp=16, devices=devices)
except ValueError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "data=1 is split over 2 slices; make it a multiple of 2" in run.stdout


def test_parts_of_a_dimension_are_those_of_its_axes():
    assert sharding.num_parts("batch") == 1
    with jax.set_mesh(sharding.make_mesh(data=2, fsdp=2, context=1, tensor=2)):
        assert [sharding.num_parts(name) for name in ("batch", "rows", "columns", "channels")] == [4, 1, 2, 1]


def test_look_up_is_strict():
    assert sharding.spec("batch", "tokens", None) == P(("data", "fsdp"), "context", None)
    with pytest.raises(ValueError, match="'head' is not in AXIS_RULES; did you mean heads"):
        sharding.spec("head")
    with pytest.raises(ValueError, match="used twice"):
        sharding.spec("heads", "mlp")  # both want the tensor axis
    with pytest.raises(ValueError, match="used twice"):
        sharding.spec("batch", "width")  # both want fsdp: Flax by itself would drop one of them
    with pytest.raises(ValueError, match="used twice"):
        sharding.partitioned(nn.initializers.zeros, "width", "width")


def test_constrain_splits_inside_jit_and_is_the_identity_without_a_mesh():
    x = jnp.ones((8, 4, 6))
    pin = jax.jit(lambda x: sharding.constrain(x, "batch", "tokens", None))
    assert len(pin(x).sharding.device_set) == 1
    with jax.set_mesh(sharding.make_mesh(data=2, fsdp=2, context=2)):
        assert {shard.data.shape for shard in pin(x).addressable_shards} == {(2, 2, 6)}
    with pytest.raises(ValueError, match="2 logical axes"):
        sharding.constrain(x, "batch", None)


def test_parameters_lie_as_named_and_what_does_not_divide_is_listed():
    class Layer(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x):
            init = sharding.partitioned(nn.initializers.ones, "width", "mlp")
            bias = sharding.partitioned(nn.initializers.zeros, "mlp")
            return x @ self.param("kernel", init, (self.width, 6)) + self.param("bias", bias, (6,))

    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    boxed = jax.eval_shape(lambda: Layer(8).init(jax.random.key(0), jnp.ones((1, 8))))
    tree = sharding.shardings(boxed, mesh)["params"]
    assert tree["kernel"].spec == P(("fsdp", "context"), "tensor")
    assert tree["bias"].spec == P("tensor")
    odd = jax.eval_shape(lambda: Layer(7).init(jax.random.key(0), jnp.ones((1, 7))))
    with pytest.raises(ValueError, match=r"kernel.*\(7, 6\): 7 does not divide over fsdp x context=4"):
        sharding.shardings(odd, mesh)


def test_the_sides_of_adapters_are_split_as_far_as_they_divide():
    sides = {"16": 16, "12": 12, "6": 6, "3": 3}
    tree = {name: sharding.partitioned(nn.initializers.zeros, None, "adapter") for name in sides}
    boxed = {name: init(jax.random.key(0), (2, sides[name])) for name, init in tree.items()}
    split = sharding.shardings(boxed, sharding.make_mesh(fsdp=2, context=2, tensor=2))
    assert {name: where.spec for name, where in split.items()} == {
        "16": P(None, ("tensor", "fsdp", "context")),
        "12": P(None, ("tensor", "fsdp")),
        "6": P(None, ("tensor",)),
        "3": P(None, ()),
    }
