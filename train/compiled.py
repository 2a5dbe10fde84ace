"""The model's forward and backward pass as kernels that `torch.compile` makes: fewer passes over memory."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from sim.compiling import compiled
from sim.system import Batch
from train.config import ModelConfig
from train.model import Parameters, forward


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

    return compiled(run)
