# SPDX-License-Identifier: Apache-2.0
"""stvdm: train and sample video diffusion transformers in JAX, from a laptop to a TPU pod.

    import stvdm

    pipeline = stvdm.Pipeline.load()                    # the bundled model
    result = pipeline.generate(["a red ball bounces to the right"], seed=0)
    result.videos                                       # uint8 (n, T, H, W, 3)

Names are imported when they are first used (PEP 562), so `import stvdm` is quick and starts no accelerator.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_MODULES = (
    "shapes",
    "sharding",
    "config",
    "checkpoint",
    "models",
    "diffusion",
    "data",
    "preprocess",
    "sampling",
    "evaluation",
    "train",
    "ablations",
)
_NAMES = {  # public name -> the module it lives in
    "Pipeline": "stvdm.sampling.pipeline",
    "Autoencoder": "stvdm.models.autoencoder3d",
    "DiT": "stvdm.models.dit",
    "TextEncoder": "stvdm.models.text_encoders",
    "WordTokenizer": "stvdm.models.text_encoders",
}

__all__ = ["Autoencoder", "DiT", "Pipeline", "TextEncoder", "WordTokenizer", "__version__"]

if TYPE_CHECKING:  # what an editor and mypy see; at run time __getattr__ below does it
    from stvdm.models.autoencoder3d import Autoencoder
    from stvdm.models.dit import DiT
    from stvdm.models.text_encoders import TextEncoder, WordTokenizer
    from stvdm.sampling.pipeline import Pipeline


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"stvdm.{name}")
    raise AttributeError(f"module 'stvdm' has no attribute {name!r}; it has {', '.join(sorted([*_NAMES, *_MODULES]))}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES, *_MODULES])
