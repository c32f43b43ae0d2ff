# SPDX-License-Identifier: Apache-2.0
"""Two and four processes train as one device does, whatever the mesh and the attention."""

import json

import numpy as np
import pytest
from runs import NUM_DEVICES, finish, losses_and_gradients, moments

from stvdm.sampling.pipeline import Pipeline
from stvdm.train.telemetry import read_metrics

pytestmark = pytest.mark.slow

MESHES = {
    "fsdp": dict(data=1, fsdp=4),
    "fsdp-context": dict(data=1, fsdp=2, context=2),
    "context-tensor": dict(data=1, context=2, tensor=2),
    "data-tensor": dict(data=2, tensor=2),
}
PATTERNS = ("full", "frame", "time", "window", "block_causal")


@pytest.fixture
def config(dit_config):
    def make(mesh):
        changes = {f"mesh__{axis}": size for axis, size in mesh.items()}
        model = dict(model__attention=PATTERNS, model__num_layers=len(PATTERNS), model__window=(1, 1, 1))
        return dit_config(total_steps=3, checkpoint_every=100, **model, **changes)

    return make


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The losses and the moments of one process with one device; made by the first test that asks."""
    folder, found = tmp_path_factory.mktemp("alone"), []

    def make(config):
        if not found:
            finish(folder / "run", config, kind="dit", num_processes=1, num_devices=1, anywhere=True)
            found.extend((losses_and_gradients(folder / "run"), moments(folder / "run")))
        return found

    return make


def assert_same(workdir, expected):
    """Losses and the norms of gradients within 1e-4; the moments of every parameter within 1e-3 of their norm.

    Some gradients are zero but for rounding (that of a bias which a softmax takes no notice of): hence 1e-6 of all.
    """
    series, by_parameter = expected
    np.testing.assert_allclose(losses_and_gradients(workdir), series, rtol=1e-4)
    found = moments(workdir)
    assert found.keys() == by_parameter.keys() and len(found) > 20
    whole = np.sqrt(sum(np.square(leaf).sum() for leaf in by_parameter.values()))
    apart = {name: np.linalg.norm(found[name] - leaf) for name, leaf in by_parameter.items()}
    allowed = {name: 1e-3 * np.linalg.norm(leaf) + 1e-6 * whole for name, leaf in by_parameter.items()}
    assert {name: (apart[name], allowed[name]) for name in apart if apart[name] > allowed[name]} == {}


@pytest.mark.parametrize(
    ("num_processes", "mesh"), [(2, "fsdp"), (2, "fsdp-context"), (4, "context-tensor"), (4, "data-tensor")]
)
def test_several_processes_train_as_one_device(config, alone, tmp_path, num_processes, mesh):
    expected = alone(config(dict(data=1)))
    finish(tmp_path / "run", config(MESHES[mesh]), kind="dit", num_processes=num_processes, anywhere=True)
    assert expected[0].shape == (3, 2)
    assert num_processes <= NUM_DEVICES
    assert_same(tmp_path / "run", expected)


def test_a_run_goes_on_in_more_processes_and_in_fewer_on_another_mesh(config, alone, tmp_path):
    expected = alone(config(dict(data=1)))
    for steps, num_processes, mesh in ((1, 1, "fsdp"), (2, 4, "context-tensor"), (3, 2, "fsdp-context")):
        part = config(MESHES[mesh])
        part.total_steps = steps
        finish(tmp_path / "run", part, kind="dit", num_processes=num_processes, anywhere=True)
    assert_same(tmp_path / "run", expected)


def test_clips_that_were_replaced_are_counted_once_by_all_processes_and_over_restarts(config, tmp_path):
    def replaced(name):
        return json.loads((tmp_path / name / "data.json").read_text())["num_replaced"]

    broken, whole = list(range(0, 64, 3)), config(dict(data=1))
    whole.total_steps = 4
    finish(tmp_path / "whole", whole, kind="dit", num_processes=1, num_devices=1, broken=broken)
    assert sum(replaced("whole").values()) > 5
    for steps, mesh in ((2, "fsdp"), (4, "context-tensor")):  # in the second, both processes read all rows
        part = config(MESHES[mesh])
        part.total_steps = steps
        finish(tmp_path / "parts", part, kind="dit", broken=broken)
    assert replaced("parts") == replaced("whole")


def test_two_processes_evaluate_preview_and_leave_one_model(config, alone, tmp_path):
    changes = config(dict(fsdp=4))
    changes.eval_every, changes.eval_batches = 3, 1
    finish(tmp_path / "run", changes, kind="dit", anywhere=True)
    expected = alone(config(dict(data=1)))
    assert_same(tmp_path / "run", expected)
    scores = [record["eval/velocity_mse"] for record in read_metrics(tmp_path / "run") if "eval/velocity_mse" in record]
    assert len(scores) == 1 and np.isfinite(scores).all()
    assert (tmp_path / "run" / "previews" / "samples-00000003.png").exists()
    assert Pipeline.load(tmp_path / "run").generate(["a red ball bounces"]).videos.shape == (1, 5, 16, 16, 3)
