# SPDX-License-Identifier: Apache-2.0
"""The update, the optimisers and the streams of randomness that both trainers stand on."""

import functools
import json
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stvdm import config as base
from stvdm import sharding
from stvdm.checkpoint import Checkpoints
from stvdm.data.folder import SkipReport
from stvdm.train import split_weights
from stvdm.train import state as state_lib


class Net(nn.Module):
    """A stacked kernel, a plain one, a convolution's and a bias, partitioned over two axes."""

    @nn.compact
    def __call__(self, x):
        kernel = nn.initializers.normal(0.1)
        stack = self.param("layers", lambda key: {"kernel": self._stack(key)})
        x = x @ nn.unbox(stack)["kernel"][0] + x @ nn.unbox(stack)["kernel"][1]
        x = x @ self.param("kernel", sharding.partitioned(kernel, "width", "mlp"), (8, 4))
        return x + self.param("bias", sharding.partitioned(nn.initializers.zeros, "mlp"), (4,))

    def _stack(self, key):
        make = sharding.partitioned(nn.initializers.normal(0.1), "layers", "width", None)
        return make(key, (2, 8, 8))


def _settings(name="adamw", **changes):
    config = base.dit().optimizer
    with config.unlocked():
        config.name, config.learning_rate, config.warmup_steps = name, 1e-2, 2
        config.update(changes)
    return config


def _start(name="adamw", mesh=None, **changes):
    optimizer, _ = state_lib.make_optimizer(_settings(name, **changes), total_steps=10)
    init = lambda: Net().init(jax.random.key(0), jnp.ones((1, 8)))["params"]  # noqa: E731
    program = state_lib.Program(init, optimizer, None, None, None, None)
    return state_lib.initialise(program, mesh or sharding.make_mesh()), optimizer


def _grads(params, x):
    return jax.grad(lambda p: jnp.mean(Net().apply({"params": p}, x) ** 2))(params)


LOSS = np.float32(1)
X = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_are_split_like_their_weights(name):
    state, _ = _start(name, mesh=sharding.make_mesh(fsdp=4, tensor=2))
    assert state.params["kernel"].sharding.spec == sharding.spec("width", "mlp")
    moments = [
        leaf
        for leaf in jax.tree.leaves(state.opt_state)
        if leaf.shape == (8, 4) and leaf.sharding.spec == sharding.spec("width", "mlp")
    ]
    assert moments, "no moment of the kernel is split like the kernel"
    assert not any(
        leaf.shape == (8, 4) and leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.opt_state)
    )


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_sharded_steps_equal_single_device_steps(name):
    def run(mesh):
        state, optimizer = _start(name, mesh=mesh)
        step = jax.jit(
            lambda s, x: state_lib.update(s, _grads(s.params, x), loss=LOSS, optimizer=optimizer, ema_decay=0.9)[0],
            out_shardings=jax.tree.map(lambda leaf: leaf.sharding, state),
        )
        for _ in range(3):
            state = step(state, X)
        return jax.device_get(state)

    one = run(sharding.make_mesh(devices=jax.devices()[:1]))
    many = run(sharding.make_mesh(fsdp=4, tensor=2))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def test_muon_orthogonalises_each_stacked_layer_and_leaves_vectors_to_adam():
    matrices = state_lib._matrices(
        {"layers": {"kernel": jnp.ones((3, 4, 5))}, "kernel": jnp.ones((3, 3, 4, 5)), "bias": jnp.ones(5)}
    )
    assert (matrices["layers"]["kernel"].reduction_axis, matrices["layers"]["kernel"].output_axis) == ((1,), 2)
    assert (matrices["kernel"].reduction_axis, matrices["kernel"].output_axis) == ((0, 1, 2), 3)
    assert matrices["bias"] is None
    state, optimizer = _start("muon", clip_norm=1e9)
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(1), p.shape), state.params)
    updates, _ = optimizer.update(grads, state.opt_state, state.params)
    for layer in updates["layers"]["kernel"]:
        singular = np.linalg.svd(layer, compute_uv=False)
        assert singular.max() / singular.min() < 3  # a random 8 x 8 matrix spreads tens to hundreds fold


def test_non_finite_gradients_change_nothing_and_are_counted():
    state, optimizer = _start()
    good = _grads(state.params, X)
    state, _ = state_lib.update(state, good, loss=LOSS, optimizer=optimizer, ema_decay=0.9)
    bad = jax.tree.map(lambda g: g.at[(0,) * g.ndim].set(jnp.nan), good)
    after, metrics = state_lib.update(state, bad, loss=LOSS, optimizer=optimizer, ema_decay=0.9)
    assert int(after.num_skipped) == int(metrics["num_skipped"]) == 1
    assert int(after.step) == int(state.step) + 1
    for name in ("params", "ema", "opt_state"):
        for a, b in zip(jax.tree.leaves(getattr(after, name)), jax.tree.leaves(getattr(state, name)), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_loss_that_is_not_finite_is_skipped_though_its_gradients_are():
    state, optimizer = _start()
    good = _grads(state.params, X)
    after, metrics = state_lib.update(state, good, loss=np.float32(np.inf), optimizer=optimizer, ema_decay=0.9)
    assert int(metrics["num_skipped"]) == 1
    np.testing.assert_array_equal(after.params["kernel"], state.params["kernel"])


def test_the_average_follows_the_recursion():
    state, optimizer = _start()
    expected = jax.tree.map(np.asarray, state.ema)
    for n in range(30):
        state, _ = state_lib.update(state, _grads(state.params, X), loss=LOSS, optimizer=optimizer, ema_decay=0.7)
        decay = min(0.7, (1 + n) / (10 + n))
        expected = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * np.asarray(p), expected, state.params)
    for a, b in zip(jax.tree.leaves(state.ema), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    def loss(params, batch, key):
        del key
        return jnp.mean(Net().apply({"params": params}, batch["x"]) ** 2), {"mean": jnp.mean(batch["x"])}

    params = _start()[0].params
    key = jax.random.key(3)
    whole, metrics = state_lib.accumulated_grad(loss, 1)(params, {"x": X}, key)
    parts, part_metrics = state_lib.accumulated_grad(loss, 4)(params, {"x": X}, key)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["mean"], part_metrics["mean"], rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], part_metrics["loss"], rtol=1e-5)


@pytest.mark.parametrize("num_micro", [1, 4])
def test_gradients_kept_in_the_type_of_the_products_are_the_same(num_micro):
    def loss(params, batch, key):
        half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        return jnp.mean(jnp.square(Net().apply({"params": half}, batch["x"]).astype(jnp.float32))), {}

    params, given = _start()[0].params, ({"x": X.astype(jnp.bfloat16)}, jax.random.key(3))
    expected, _ = jax.jit(state_lib.accumulated_grad(loss, num_micro))(params, *given)
    halved = split_weights.split(params, lambda path: True)
    found, _ = jax.jit(state_lib.accumulated_grad(loss, num_micro))(halved, *given)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}


def test_weight_decay_spares_vectors_also_of_stacked_layers():
    layer = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), layer)
    params = {"layers": {"linear": stacked}, "layers_0": {"linear": layer}}
    settings = base.dit().optimizer.copy_and_resolve_references()
    settings.update(weight_decay=0.1, warmup_steps=0, schedule="constant", learning_rate=0.5)
    for name in ("adamw", "muon"):
        settings.name = name
        optimizer, _ = state_lib.make_optimizer(settings, 10)
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, _ = optimizer.update(zeros, optimizer.init(params), params)
        for layers in updates.values():
            assert (layers["linear"]["kernel"] < 0).all()
            assert (layers["linear"]["bias"] == 0).all()


def test_the_schedule_warms_up_and_ends_where_told():
    rate = state_lib.make_optimizer(_settings(final_fraction=0.1), total_steps=10)[1]
    assert 0 < float(rate(0)) < float(rate(1)) <= float(rate(2)) == pytest.approx(1e-2)
    assert float(rate(10)) == pytest.approx(1e-3)


def test_a_stable_schedule_is_the_same_until_it_decays():
    short, long = (
        state_lib.make_optimizer(_settings(schedule="wsd", decay_fraction=0.5), total_steps=n)[1] for n in (10, 20)
    )
    rates = [[float(rate(step)) for step in range(21)] for rate in (short, long)]
    assert rates[0][:6] == rates[1][:6] and rates[0][5] == pytest.approx(1e-2)  # so a longer run goes on from it
    np.testing.assert_allclose(rates[0][5:11], np.linspace(1e-2, 0, 6), atol=1e-9)
    np.testing.assert_allclose(rates[1][10:], np.linspace(1e-2, 0, 11), atol=1e-9)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_first_moments_may_be_kept_in_half_the_bytes(name):
    states = {}
    for moments in ("float32", "bfloat16"):
        state, optimizer = _start(name, moments=moments)
        for _ in range(3):
            state, _ = state_lib.update(state, _grads(state.params, X), loss=LOSS, optimizer=optimizer, ema_decay=0.9)
        states[moments] = state
        kernels = [
            (jax.tree_util.keystr(path), leaf.dtype)
            for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
            if leaf.shape == (8, 4)
        ]
        assert {str(dtype) for where, dtype in kernels if ".mu" in where} == {moments}
        assert all(dtype == jnp.float32 for where, dtype in kernels if ".nu" in where)
    jax.tree.map(
        lambda whole, half: np.testing.assert_allclose(whole, half, rtol=2e-2, atol=2e-3),
        states["float32"].params,
        states["bfloat16"].params,
    )


def test_a_batch_is_dealt_out_by_what_devices_hold_and_comes_together_again():
    for axes in (dict(data=2, tensor=4), dict(data=2, fsdp=2, context=2), dict(data=1, tensor=8)):
        mesh = sharding.make_mesh(**axes)
        parts = axes["data"] * axes.get("fsdp", 1)
        assert state_lib.shards_here(mesh) == (parts, list(range(parts)))  # this process has all devices
        batch = state_lib.to_mesh({"video": X, "caption": ["a"] * 8}, mesh)
        np.testing.assert_array_equal(batch.pop("video"), X)
        assert not batch


def test_a_process_reads_what_its_devices_hold_whoever_holds_it_too(monkeypatch):
    """Four processes of two devices: 0 and 1 share the first half of each batch, 2 and 3 the second."""
    split = sharding.batch_sharding(mesh := sharding.make_mesh(data=2, tensor=4))
    every = split.devices_indices_map
    found = []
    for process in range(4):
        mine = jax.devices()[2 * process : 2 * process + 2]
        of_mine = lambda shape, mine=mine: {device: every(shape)[device] for device in mine}  # noqa: E731
        held = types.SimpleNamespace(shard_shape=split.shard_shape, addressable_devices_indices_map=of_mine)
        monkeypatch.setattr(sharding, "batch_sharding", lambda _, held=held: held)
        found.append(state_lib.shards_here(mesh))
    assert found == [(2, [0]), (2, [0]), (2, [1]), (2, [1])]


def test_processes_that_find_other_data_say_so(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    others = []
    monkeypatch.setattr(
        state_lib.multihost_utils, "process_allgather", lambda mine: np.stack([mine, mine, *(others or [mine])])
    )
    position = {"step": 0, "fingerprint": "abc", "seed": 0}
    state_lib._check_all_find(position)
    others.append(np.zeros(32, np.uint8))
    with pytest.raises(ValueError, match=r"processes \[2\] do not find the data .* fingerprint abc.*same files"):
        state_lib._check_all_find(position)


def test_what_was_replaced_counts_in_all_processes_and_over_restarts(tmp_path, monkeypatch):
    mesh, report = sharding.make_mesh(), SkipReport(num_found=3, skipped={"c.mp4": "empty"})
    batches = types.SimpleNamespace(report=report)
    position = {"step": 7, "replaced": {"num_replaced": {"a.mp4": 2}, "reasons": {"a.mp4": "gone"}}}
    saved = types.SimpleNamespace(latest=7, position=lambda: position)
    write = state_lib.reporter(batches, saved, tmp_path / "run", mesh)
    report.replaced("a.mp4", "gone too")
    first = write()
    assert first == write()  # asked again, it counts nothing again
    found = json.loads((tmp_path / "run" / "data.json").read_text())
    assert (found["num_used"], found["num_replaced"]) == (2, {"a.mp4": 3})
    other = {"num_replaced": {"a.mp4": 1, "b.mp4": 1}, "reasons": {"a.mp4": "gone", "b.mp4": "cut"}}
    monkeypatch.setattr(state_lib, "_of_all", lambda mine: [mine, [[5], other], [[5], other]])  # two read the same rows
    assert write().num_replaced == {"a.mp4": 4, "b.mp4": 1}


def _program(name="adamw", **changes):
    optimizer, _ = state_lib.make_optimizer(_settings(name, **changes), total_steps=10)
    return state_lib.Program(lambda: Net().init(jax.random.key(0), X)["params"], optimizer, None, None, None, None)


def test_a_checkpoint_is_gone_on_from_without_a_fresh_state_beside_it(tmp_path, monkeypatch):
    mesh, position = sharding.make_mesh(fsdp=4, tensor=2), {"step": 0, "seed": 0}
    config = base.dit()
    with Checkpoints(tmp_path) as checkpoints:
        state, first_step = state_lib.resume(checkpoints, config, _program(), mesh, position=position)
        assert first_step == 0
        saved = state._replace(params=jax.tree.map(lambda leaf: leaf + 1, state.params))
        checkpoints.save(3, saved, position={**position, "step": 3}, config=config.to_dict())
    monkeypatch.setattr(state_lib, "initialise", lambda *_: pytest.fail("twice the memory"))
    with Checkpoints(tmp_path) as checkpoints:
        found, first_step = state_lib.resume(checkpoints, config, _program(), mesh, position=position)
        assert first_step == 3
        expected = state_lib.abstract_state(_program(), mesh)
        assert jax.tree.all(jax.tree.map(lambda leaf, like: leaf.sharding == like.sharding, found, expected))
        jax.tree.map(np.testing.assert_array_equal, found, saved)
        with pytest.raises(ValueError, match="seed: saved 0, now 1"):
            state_lib.resume(checkpoints, config, _program(), mesh, position={**position, "seed": 1})
        config.optimizer.moments = "bfloat16"
        with pytest.warns(UserWarning, match="saved 'float32', now 'bfloat16': the first moments are converted"):
            found, _ = state_lib.resume(checkpoints, config, _program(moments="bfloat16"), mesh, position=position)
        assert {leaf.dtype for leaf in jax.tree.leaves(found.opt_state)} >= {jnp.dtype(jnp.bfloat16)}
        config.optimizer.name = "muon"
        with pytest.raises(ValueError, match="optimizer.name: saved 'adamw', now 'muon'"):
            state_lib.resume(checkpoints, config, _program("muon"), mesh, position=position)


def _halved(params):
    return split_weights.split(params, lambda path: path[-1].key == "kernel")


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weights_in_halves_are_updated_as_whole_ones(name):
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    plain = _program(name, weight_decay=0.1)
    whole, halves = (state_lib.initialise(program, mesh) for program in (plain, plain._replace(kept=_halved)))
    kernel = halves.params["kernel"]
    assert kernel.high.sharding == kernel.low.sharding == halves.ema["kernel"].sharding
    step = jax.jit(
        lambda state, grads: state_lib.update(state, grads, loss=LOSS, optimizer=plain.optimizer, ema_decay=0.9)[0]
    )
    for number in range(4):
        grads = jax.tree.map(lambda p, n=number: jax.random.normal(jax.random.key(n), p.shape), whole.params)
        if number == 2:
            grads["bias"] = grads["bias"].at[0].set(jnp.nan)
        whole, halves = step(whole, grads), step(halves, grads)
    assert int(halves.num_skipped) == 1 and halves.params["kernel"].high.dtype == jnp.bfloat16
    jax.tree.map(np.testing.assert_array_equal, state_lib.to_save(halves), whole)


def test_a_checkpoint_holds_whole_weights(tmp_path):
    """So that a run goes on whether it kept them in halves or not."""
    mesh, config, position = sharding.make_mesh(fsdp=4, tensor=2), base.dit(), {"step": 0}
    halved = _program()._replace(kept=_halved)
    with Checkpoints(tmp_path) as checkpoints:
        state, _ = state_lib.resume(checkpoints, config, halved, mesh, position=position)
        saved = state_lib.to_save(state)
        checkpoints.save(1, saved, position={"step": 1}, config=config.to_dict())
    for program in (halved, _program()):
        with Checkpoints(tmp_path) as checkpoints:
            found, _ = state_lib.resume(checkpoints, config, program, mesh, position=position)
        expected = state_lib.abstract_state(program, mesh)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        assert jax.tree.all(jax.tree.map(lambda leaf, like: leaf.sharding == like.sharding, found, expected))
        jax.tree.map(np.testing.assert_array_equal, state_lib.to_save(found), saved)


def test_clipping_bounds_the_step():
    state, optimizer = _start(clip_norm=1e-3, b1=0.0, b2=0.0)
    huge = jax.tree.map(lambda p: 1e6 * jnp.ones_like(p), state.params)
    clipped, _ = optax.clip_by_global_norm(1e-3).update(huge, optax.EmptyState())
    assert float(optax.tree.norm(clipped)) == pytest.approx(1e-3, rel=1e-4)
    _, metrics = state_lib.update(state, huge, loss=LOSS, optimizer=optimizer, ema_decay=0.9)
    assert float(metrics["grad_norm"]) > 1e6  # what is reported is the norm before clipping


def test_streams_differ_by_seed_step_and_purpose_and_repeat():
    draw = lambda *args: float(jax.random.uniform(state_lib.stream(*args)))  # noqa: E731
    base_draw = draw(0, 5, "noise")
    assert draw(0, 5, "noise") == base_draw
    assert len({base_draw, draw(1, 5, "noise"), draw(0, 6, "noise"), draw(0, 5, "times")}) == 4


# --- starting from weights, and training some ------------------------------------------------------------------------


def test_a_run_starts_from_weights_and_says_what_is_fresh():
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    state = state_lib.initialise(_program(), mesh)
    weights = {"kernel": np.full((8, 4), 7.0, np.float32), "layers": {"kernel": np.full((2, 8, 8), 3.0, np.float32)}}
    found, fresh = state_lib.start_from(state, weights)
    assert fresh == ["bias"]
    for params in (found.params, found.ema):
        jax.tree.map(np.testing.assert_array_equal, {k: params[k] for k in weights}, weights)
        np.testing.assert_array_equal(params["bias"], state.params["bias"])
        assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, params, state.params))
    assert found.step == 0 and found.opt_state is state.opt_state


def test_weights_that_have_no_place_are_refused():
    state = state_lib.initialise(_program(), sharding.make_mesh())
    weights = {"kernel": np.zeros((8, 5), np.float32), "bias": np.zeros(4, np.float32), "more": np.zeros(2, np.float32)}
    with pytest.raises(
        ValueError, match=r"kernel is \(8, 5\), expected \(8, 4\); more is \(2,\), expected none\. Make"
    ):
        state_lib.start_from(state, weights)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_what_is_not_trained_stays_has_no_moments_and_no_say_in_clipping(name):
    settings = _settings(name, weight_decay=0.1, clip_norm=0.01)
    optimizer, _ = state_lib.make_optimizer(settings, 10, train_only="^kernel|bias")
    program = _program()._replace(optimizer=optimizer)
    state = state_lib.initialise(program, sharding.make_mesh(fsdp=4, tensor=2))

    def loss(params, batch, key):
        used = state_lib.left_alone(params, "^kernel|bias")
        return jnp.mean(jnp.square(Net().apply({"params": used}, batch["x"]) - 1)), {}

    gradient = jax.jit(state_lib.accumulated_grad(loss, 1))
    grads, metrics = gradient(state.params, {"x": X}, jax.random.key(0))
    assert not np.any(grads["layers"]["kernel"]) and np.any(grads["kernel"])
    update = jax.jit(functools.partial(state_lib.update, optimizer=optimizer, ema_decay=0.9))
    after, _ = update(state, grads, loss=metrics["loss"])
    np.testing.assert_array_equal(after.params["layers"]["kernel"], state.params["layers"]["kernel"])
    assert not np.array_equal(after.params["kernel"], state.params["kernel"])
    assert (2, 8, 8) not in {leaf.shape for leaf in jax.tree.leaves(state.opt_state)}


def test_micro_batches_that_leave_devices_idle_are_refused():
    """Where data is -1 a config does not say how many devices share a batch."""
    config = base.autoencoder()
    config.data.buckets = ((5, 16, 16, 8, 1.0), (9, 16, 16, 4, 1.0))
    config.optimizer.accumulate = 2
    base.validate(config)
    with pytest.raises(ValueError, match=r"batch=4: expected a multiple of .* = 4 x 2, so that no device"):
        state_lib.open_batches(config, sharding.make_mesh(data=-1, context=2))


def test_training_nothing_is_refused():
    with pytest.raises(ValueError, match="train_only='temporl': found in no parameter's path; they are like .*kernel"):
        state_lib.are_trained(_start()[0].params, "temporl")
