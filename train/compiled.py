"""The model's forward and backward pass as kernels that `torch.compile` makes: fewer passes over memory."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sim.system import Batch
from train.config import ModelConfig
from train.model import Parameters, forward

MOST_SHAPES = 4096  # that a process may compile, where torch would stop at 8


def compiled_forward(model: ModelConfig, parameters: Parameters, batch: Batch) -> Tensor:
    """`train.model.forward`, compiled for each shape of pack and batch that it meets (seconds; torch keeps it on disk).

    On a CPU a member's numbers do not depend on the pack's size, as without; they differ from eager ones by rounding.
    Raises at the first call what torch raises where nothing can be compiled (on a CPU, without a C++ compiler).
    """
    return _kernels(model)(dict(parameters), batch.inputs, batch.mask, batch.keys, batch.allowed)


@functools.cache
def _kernels(model: ModelConfig) -> Callable[..., Tensor]:
    def run(
        parameters: dict[str, Tensor], inputs: Tensor, mask: Tensor | None, keys: Tensor | None, allowed: Tensor | None
    ) -> Tensor:
        batch = Batch(inputs=inputs, targets=inputs, mask=mask, keys=keys, allowed=allowed)
        return forward(parameters, model, batch)

    with warnings.catch_warnings():  # torch's compiler uses what torch deprecates
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("torch._inductor.compile_fx")
    limits: Any = importlib.import_module("torch._dynamo.config")
    limits.recompile_limit = limits.accumulated_recompile_limit = MOST_SHAPES
    compiled: Callable[..., Tensor] = torch.compile(run, dynamic=False, fullgraph=True, options={"compile_threads": 1})
    return compiled
