# SPDX-License-Identifier: Apache-2.0
"""One folder of coded files for all tests of this directory."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def coded() -> ModuleType:
    """The module `coded_files.py` beside this file."""
    spec = importlib.util.spec_from_file_location("coded_files", Path(__file__).with_name("coded_files.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["coded_files"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def folder(coded: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only, please."""
    return coded.make_folder(tmp_path_factory.mktemp("coded"))
