"""One optimiser step of a few members of a pack, in place on their rows of its state."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import EllipsisType

import torch
from torch import Tensor
from torch.optim.adam import adam

from sim.generator import Generator
from sim.system import Batch, Rows, System
from train.compiled import compiled_forward
from train.config import ModelConfig, Precision, TrainConfig
from train.gradient import Gradient
from train.model import Parameters, TensorSpec, forward
from train.neighbours import draw
from train.state import State, unflatten

LONG_ROW = 1 << 16  # parameters from which on a CPU takes members' updates one by one, with fewer passes over memory
DIVERGED_LOSS = 1e6  # a member above this is frozen, as is one whose loss or gradient is not finite


@contextmanager
def arithmetic(precision: Precision, device: torch.device) -> Iterator[None]:
    """Matrix products as `TrainConfig.precision` says, whatever was set before; on leaving, as before."""
    cuda = device.type == "cuda"
    matmul = torch.backends.cuda.matmul if cuda else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32" if cuda and precision == "tf32" else "ieee"
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False):
            yield
    finally:
        matmul.fp32_precision = before


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What all parts of a pack share. rate: each parameter's own learning rate relative to its member's `[1, P]`, or
    None where all are 1."""

    system: System
    rows: Rows
    model: ModelConfig
    train: TrainConfig
    specs: Mapping[str, TensorSpec]
    rate: Tensor | None

    def predict(self, parameters: Parameters, batch: Batch) -> Tensor:
        """Predictions `[S, B, N, d_out]` of all members."""
        if self.train.compiled:
            return compiled_forward(self.model, parameters, batch)
        return forward(parameters, self.model, batch)


class Part:
    """A few members of a pack: one optimiser step of them all, in place on their rows of the pack's state."""

    def __init__(self, task: Task, state: State, trains: Sequence[TrainConfig]) -> None:
        self.task, self.state = task, state
        self.rate = self._column([train.learning_rate for train in trains])
        self.decay = self._column([train.weight_decay for train in trains])
        self.clip = self._column([train.clip if train.clip is not None else math.inf for train in trains])
        self.decays, self.clips = bool(self.decay.any()), bool(self.clip.isfinite().any())
        weights = self.state.weights
        self.parameters = {name: view.requires_grad_() for name, view in unflatten(weights, task.specs).items()}
        self.gradient = torch.zeros_like(weights)
        self.gradients = unflatten(self.gradient, task.specs)
        by_autograd = task.train.compiled or task.train.precision == "bf16"
        self.spelt_out = None if by_autograd else Gradient(task.model, self.parameters, self.gradients)
        self.frozen = bool((state.diverged >= 0).any())
        self.by_rows = weights.device.type == "cpu" and task.rate is None and weights.shape[1] >= LONG_ROW
        self.direction = weights.new_zeros(0 if self.by_rows else len(weights), weights.shape[1])
        self.counts = torch.full((len(weights) if self.by_rows else 1,), float(state.step), device=weights.device)

    def _column(self, values: Sequence[float]) -> Tensor:
        weights = self.state.weights
        return torch.tensor(values, dtype=weights.dtype, device=weights.device)[:, None]

    def take(self, step: Tensor, index: Tensor, noise: Generator) -> None:
        """Step number `step` of every member that runs: on the rows at `index [S, B]`, with `noise` for what is random.

        Touches memory at fixed addresses only and asks the host nothing on a GPU, so that it can be recorded.
        """
        task = self.task
        batch = draw(task.system, task.model, task.rows.take(index), noise)
        with arithmetic(task.train.precision, index.device):
            loss = self._differentiate(batch)
        with torch.no_grad():
            self._update(step, loss)

    def _differentiate(self, batch: Batch) -> Tensor:
        """Mean loss of each member, `[S]`; its gradient is left in the buffer."""
        if self.spelt_out is not None and batch.keys is None:
            return self.spelt_out.of(self.task.system.loss, batch)
        loss = self.task.system.loss(self.task.predict(self.parameters, batch), batch).mean(-1)
        found = torch.autograd.grad(loss.sum(), list(self.parameters.values()))
        torch._foreach_copy_(list(self.gradients.values()), found)
        return loss.detach()

    def _update(self, step: Tensor, loss: Tensor) -> None:
        state, gradient = self.state, self.gradient
        norm = torch.linalg.vector_norm(gradient, dim=1)
        sound = (norm < math.inf) & (loss <= DIVERGED_LOSS)  # NaN is neither
        if self.clips:
            gradient.mul_((self.clip / norm[:, None]).clamp_max(1.0))
        rate = self.rate
        if self.frozen or gradient.device.type != "cpu" or not sound.all():  # only a CPU is asked
            self.frozen = True
            state.diverged.masked_fill_(~sound & (state.diverged < 0), step)
            ill = state.diverged >= 0
            loss = loss.masked_fill(ill, torch.nan)
            gradient.masked_fill_(ill[:, None], 0.0)  # NaN in a row of a frozen member would outlive any factor
            rate = rate.masked_fill(ill[:, None], 0.0)
        state.loss_sum.add_(loss)
        state.loss_count.add_(1)
        if (warmup := self.task.train.warmup) > 0:
            rate = rate * ((step + 1).double() / warmup).clamp_max(1.0).to(rate.dtype)
        if self.decays:
            state.weights.mul_(1 - rate * self.decay)
        if self.task.rate is not None:
            rate = rate * self.task.rate
        if self.task.train.optimizer == "sgd":
            state.weights.addcmul_(gradient, rate, value=-1)
        elif self.by_rows:
            for row, lr in enumerate(rate.flatten().tolist()):
                self._adam(state.weights[row], row, lr)
        else:  # at rate 1 the direction is left in a buffer of zeros
            self._adam(self.direction.zero_(), ..., 1.0)
            state.weights.addcmul_(self.direction, rate)

    def _adam(self, weights: Tensor, row: int | EllipsisType, lr: float) -> None:
        """Add the step of Adam (Kingma and Ba 2015, algorithm 1) of one member, or of all, to `weights`.

        The fused kernel knows one rate for all.
        """
        train, state = self.task.train, self.state
        count = self.counts[0 if row is ... else row]
        adam(
            [weights], [self.gradient[row]], [state.mean[row]], [state.square[row]], [], [count],
            beta1=train.beta1, beta2=train.beta2, eps=train.epsilon, lr=lr, weight_decay=0.0,
            amsgrad=False, maximize=False, fused=True,
        )  # fmt: skip
