from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import shardmill.core
import shardmill.kernels

MODULES = [
    "shardmill.errors",
    "shardmill.example",
    *(module.name for module in pkgutil.iter_modules(shardmill.core.__path__, "shardmill.core.")),
    *(module.name for module in pkgutil.iter_modules(shardmill.kernels.__path__, "shardmill.kernels.")),
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0
