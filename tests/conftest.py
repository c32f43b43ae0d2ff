# SPDX-License-Identifier: Apache-2.0
"""Every test sees eight CPU devices, whatever the machine has.

Most of a test's time is compiling programs that then run for a moment: so they are compiled with few optimisations, and
kept for the next run.
"""

import json
import os
import pathlib
import sys
import tracemalloc
import types

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
# For the TPU compiler: there is no TPU to ask, and nobody to share with.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
CACHE = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "xla"
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


TINY_AUTOENCODER = dict(
    latent_channels=4,
    width=4,
    multipliers=(1, 2),
    num_res_blocks=1,
    spatial_down=(True,),
    temporal_down=(True,),
    unshuffle=2,
    convolution="separable",
    middle_attention=False,
)
TINY_DIT = dict(width=16, num_layers=2, num_heads=2, mlp_width=32, time_features=8)
TINY_TEXT = dict(width=8, num_layers=1, num_heads=2)


def _urgency():
    return os.sched_getscheduler(0) if hasattr(os, "sched_getscheduler") else None  # where there are none


URGENCY = _urgency()


@pytest.fixture(scope="module", autouse=True)
def _as_urgent_as_before():
    """A library that leaves us a real-time priority, as SVT-AV1 does to root, starves all else on two cores."""
    yield
    assert _urgency() == URGENCY


@pytest.fixture(scope="module", autouse=True)
def _programs_go_with_their_module():
    """Thousands of compiled programs would take several GB of each worker by the end."""
    yield
    if jax := sys.modules.get("jax"):
        jax.clear_caches()


@pytest.fixture(scope="session")
def image_tower(tmp_path_factory):
    """The folder of a small published tower that looks at images, and reads nothing; every weight random."""
    import foreign
    from safetensors.numpy import save_file

    folder = tmp_path_factory.mktemp("image_encoder")
    shapes = foreign.golden()["clip"]["shapes"]
    tensors = foreign.weights({name: shape for name, shape in shapes.items() if name.startswith("vision_model")})
    save_file(tensors, folder / "model.safetensors")
    config = {**foreign.CLIP["vision_config"], "model_type": "clip_vision_model"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def peak_of():
    """Bytes that Python held at most while it ran something; what lies on devices is not among them."""

    def measure(run):
        run()  # imports and compiled programs
        tracemalloc.start()
        run()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    return measure


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """The folder of an exported model of clips of 5x16x16, every weight random, so that every part of it matters."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import numpy as np

    from stvdm import checkpoint
    from stvdm import config as base
    from stvdm.models.autoencoder3d import Autoencoder
    from stvdm.sampling import pipeline

    config = base.dit()
    config.data.buckets = ((5, 16, 16, 8, 1.0),)
    config.model.update(TINY_DIT)
    config.text.update(dict(TINY_TEXT, words=("a", "ball", "blue", "grows", "moves", "red", "square"), max_tokens=12))
    config.sample.update(dict(steps=4, guidance=2.0))
    coder = Autoencoder(**TINY_AUTOENCODER)
    models = pipeline.build(config.to_dict(), latent_channels=4)
    latent, text = jnp.zeros((1, 3, 4, 4, 4)), jnp.zeros((1, 12, 8))

    def init(key):
        keys = jax.random.split(key, 3)
        return nn.unbox(
            {
                "autoencoder": coder.init(keys[0], jnp.zeros((1, 5, 16, 16, 3)))["params"],
                "dit": models.dit.init(keys[1], latent, jnp.zeros((1, 1)), None, text)["params"],
                "text": models.text.init(keys[2], jnp.zeros((1, 12), int), jnp.ones((1, 12), bool))["params"],
            }
        )

    shapes = jax.eval_shape(init, jax.random.key(0))
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32) * 0.3, shapes)
    params["statistics"] = {"mean_z": np.full(4, 0.1, np.float32), "std_z": np.full(4, 0.5, np.float32)}
    folder = tmp_path_factory.mktemp("tiny_model")
    description = {"kind": "dit", "autoencoder": TINY_AUTOENCODER, "config": config.to_dict()}
    checkpoint.save_model(folder, params, description)
    return folder


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """gs://bucket, as etils sees it through fsspec: its listings have no gs:// before them."""
    from etils.epath import backend
    from fsspec.implementations.local import LocalFileSystem

    class Bucket(LocalFileSystem):
        cachable = False

        @classmethod
        def _strip_protocol(cls, path):
            return str(path).replace("gs://", f"{tmp_path}/", 1).rstrip("/")

    monkeypatch.setattr(type(backend.fsspec_backend), "_get_filesystem", lambda self, name: Bucket())
    (tmp_path / "bucket").mkdir()
    return tmp_path / "bucket"


CONFIG_FILE = """
from stvdm import config as base

def get_config(variant="dit"):
    if variant not in ("dit", "autoencoder"):
        raise ValueError(f"variant={variant!r}: expected dit or autoencoder")
    if variant == "autoencoder":
        return base.autoencoder()
    config = base.dit()
    config.autoencoder = "runs/ae"
    config.optimizer.learning_rate = 1e-3
    return config
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG_FILE)
    return str(path)


@pytest.fixture
def stand_in(monkeypatch):
    """Put a module of these functions in the place of a module of the library."""

    def put(name, **functions):
        module = types.ModuleType(name)
        module.__dict__.update(functions)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        monkeypatch.setattr(sys.modules.get(parent) or __import__(parent, fromlist=["_"]), child, module, raising=False)

    return put


@pytest.fixture
def calls(stand_in):
    """Every function below the commands, replaced by one that notes its arguments."""
    noted = []

    def note(name):
        return lambda *args, **kwargs: noted.append((name, args, kwargs))

    stand_in("stvdm.train.autoencoder", main=note("autoencoder"))
    stand_in("stvdm.train.dit", main=note("dit"))
    stand_in("stvdm.evaluation.run", main=note("evaluate"))
    stand_in("stvdm.evaluation.agreement", main=note("damage"))
    return noted


@pytest.fixture
def failure(capsys):
    """What a command that is refused prints."""

    def said(*argv):
        from stvdm import cli

        assert cli.main(argv) == 2
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return captured.err

    return said


@pytest.fixture(scope="session")
def tower(tmp_path_factory):
    """The folder of a small published tower: CLIP's for text, as diffusers keeps it, every weight random."""
    import json

    import foreign
    from safetensors.numpy import save_file

    config = {**foreign.CLIP["text_config"], "model_type": "clip_text_model", "max_position_embeddings": 96}
    shapes = {
        name: shape for name, shape in foreign.golden()["clip"]["shapes"].items() if name.startswith("text_model")
    }
    shapes["text_model.embeddings.position_embedding.weight"] = [96, config["hidden_size"]]
    folder = tmp_path_factory.mktemp("tower")
    save_file(foreign.weights(shapes), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    vocabulary, merges = foreign.byte_pairs()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(map(" ".join, merges)))
    return folder
