"""`torch.compile` as all of headway uses it."""

from __future__ import annotations

import importlib
import os
import shutil
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

MOST_SHAPES = 4096  # that a process may compile of one function, where torch would stop at 8

P = ParamSpec("P")
T = TypeVar("T")


def can_compile(device: torch.device) -> bool:
    """Whether there is what `torch.compile` needs: a GPU, or a C++ compiler."""
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    return device.type != "cpu" or any(shutil.which(name) for name in names)


def compiled(function: Callable[P, T]) -> Callable[P, T]:
    """The function through kernels made for each shape of its tensors that it meets, in this process alone.

    Raises at the first call what torch raises where nothing can be compiled.
    """
    with warnings.catch_warnings():  # torch's compiler uses what torch deprecates
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("torch._inductor.compile_fx")
    limits: Any = importlib.import_module("torch._dynamo.config")
    limits.recompile_limit = limits.accumulated_recompile_limit = MOST_SHAPES
    made: Callable[P, T] = torch.compile(function, dynamic=False, fullgraph=True, options={"compile_threads": 1})
    return made
