"""A step of training as a CUDA graph: recorded once, then all its kernels are launched at once."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


class Recording:
    """`work(*inputs)` as a CUDA graph. It is recorded here, not run; `work` must keep to memory at fixed addresses.

    Raises what `work` raises, and RuntimeError where it asks the host (torch refuses to record that).
    """

    def __init__(self, work: Callable[..., None], *inputs: Tensor) -> None:
        self.inputs = tuple(value.clone() for value in inputs)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            work(*self.inputs)

    def replay(self, *inputs: Tensor) -> None:
        """Run it on these inputs, shaped as those it was recorded with."""
        for place, value in zip(self.inputs, inputs, strict=True):
            place.copy_(value)
        self.graph.replay()


@functools.cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """One for all, as the memory that a stream has used stays its own."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def aside(work: Callable[[], None]) -> None:
    """Run on a side stream, as torch asks of what will be recorded afterwards."""
    here, stream = torch.cuda.current_stream(), _side_stream(torch.cuda.current_device())
    stream.wait_stream(here)
    try:
        with torch.cuda.stream(stream):
            work()
    finally:
        here.wait_stream(stream)
