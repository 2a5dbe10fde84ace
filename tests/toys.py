"""Three small systems with known floors, for tests: a masked one, an enumerated one and a noised one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sim.generator import Generator
from sim.system import Batch, Floors, Part, Predict, Rows, exclude_self, gather_keys, gather_pairs, mean_square_loss


def pair_distance(positions: Tensor, keys: Tensor | None) -> Tensor:
    return (positions.unsqueeze(-2) - gather_keys(positions, keys)).square().sum(-1).sqrt()


def mean_loss(predict: Predict, batch: Batch) -> dict[str, Tensor]:
    return {"error": mean_square_loss(predict(batch), batch).mean(-1)}


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedToy:
    """Between `fewest` and `n` real tokens x_i ~ N(0, 1); target: the sum of the *other* real tokens over sqrt(M - 1).

    The target is standard normal and independent of x_i, so nothing is learnt without attention.
    """

    n: int = 6
    fewest: int = 3
    d: int = 2
    cutoff: float = 1.0
    relation: str = "near"

    @property
    def d_in(self) -> int:
        return self.d

    @property
    def d_out(self) -> int:
        return self.d

    def rows(self, part: Part, n: int, generator: Generator) -> Rows:
        stream = generator.fold(part)
        real = self.fewest + stream.fold("count").integers(self.n - self.fewest + 1, n)
        mask = torch.arange(self.n, device=real.device) < real[:, None]
        return Rows(columns={"x": stream.fold("x").normal(n, self.n, self.d) * mask.unsqueeze(-1), "mask": mask})

    def statistics(self, rows: Rows) -> dict[str, Tensor]:
        return {}

    def draw(self, rows: Rows, generator: Generator) -> Batch:
        x, mask = rows.columns["x"], rows.columns["mask"]
        return Batch(inputs=x, targets=self.others(x, mask), mask=mask, geometry={"positions": x, "real": mask})

    def others(self, x: Tensor, mask: Tensor) -> Tensor:
        count = mask.sum(-1, keepdim=True).unsqueeze(-1)
        return (x.sum(-2, keepdim=True) - x) / (count - 1).sqrt() * mask.unsqueeze(-1)

    def relations(self, geometry: Mapping[str, Tensor], keys: Tensor | None) -> dict[str, Tensor]:
        real = geometry["real"]
        both = exclude_self(gather_pairs(real.unsqueeze(-1) & real.unsqueeze(-2), keys), keys)
        return {"near": both & (self.distance(geometry, keys) < self.cutoff), "company": both}

    def distance(self, geometry: Mapping[str, Tensor], keys: Tensor | None) -> Tensor:
        return pair_distance(geometry["positions"], keys)

    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        return mean_square_loss(prediction, batch)

    def floors(self) -> Floors:
        return Floors(trivial=1.0, without_attention=1.0, optimum=0.0)

    def diagnose(self, predict: Predict, rows: Rows, generator: Generator) -> dict[str, Tensor]:
        return mean_loss(predict, self.draw(rows, generator))

    def best(self, batch: Batch) -> Tensor:
        """The optimal predictor."""
        assert batch.mask is not None
        return self.others(batch.inputs, batch.mask)


@dataclass(frozen=True, kw_only=True, slots=True)
class EnumeratedToy:
    """(a + b) mod p from the tokens [a, b, =], one-hot; cross-entropy of logits at the token '='.

    There are p^2 examples: every fifth is for validation, the next for the probe, the others for training. Rows repeat
    them in order; nothing is random.
    """

    p: int = 7
    relation: str = "operand"

    @property
    def d_in(self) -> int:
        return self.p + 1

    @property
    def d_out(self) -> int:
        return self.p

    def rows(self, part: Part, n: int, generator: Generator) -> Rows:
        every = torch.arange(self.p**2, device=generator.key.device)
        residue = {"validation": every % 5 == 0, "probe": every % 5 == 1, "train": every % 5 > 1}[part]
        examples = every[residue].repeat(math.ceil(n / int(residue.sum())))[:n]
        operands = torch.stack((examples // self.p, examples % self.p, torch.full_like(examples, self.p)), -1)
        return Rows(columns={"tokens": operands})

    def statistics(self, rows: Rows) -> dict[str, Tensor]:
        return {}

    def draw(self, rows: Rows, generator: Generator) -> Batch:
        tokens = rows.columns["tokens"]
        asks = tokens == self.p
        answer = torch.where(asks, 0, tokens).sum(-1, keepdim=True) % self.p
        targets = functional.one_hot(answer, self.p) * asks.unsqueeze(-1)
        inputs = functional.one_hot(tokens, self.p + 1)
        return Batch(inputs=inputs.float(), targets=targets.float(), geometry={"asks": asks})

    def relations(self, geometry: Mapping[str, Tensor], keys: Tensor | None) -> dict[str, Tensor]:
        asks = geometry["asks"]
        return {"operand": gather_pairs(asks.unsqueeze(-1) & ~asks.unsqueeze(-2), keys)}

    def distance(self, geometry: Mapping[str, Tensor], keys: Tensor | None) -> None:
        return None

    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        surprise = -(batch.targets * functional.log_softmax(prediction, -1)).sum(-1)
        return (surprise if batch.mask is None else surprise * batch.mask).sum(-1)

    def floors(self) -> Floors:
        return Floors(trivial=math.log(self.p), optimum=0.0)

    def diagnose(self, predict: Predict, rows: Rows, generator: Generator) -> dict[str, Tensor]:
        batch = self.draw(rows, generator)
        right = predict(batch).argmax(-1) == batch.targets.argmax(-1)
        return {"accuracy": right[..., batch.geometry["asks"]].float().mean(-1)}

    def best(self, batch: Batch) -> Tensor:
        """The optimal predictor: reads a and b off the inputs."""
        values = torch.arange(self.p).to(batch.inputs)
        answer = (batch.inputs[..., : self.p] @ values).sum(-1).round().long() % self.p
        return 100.0 * functional.one_hot(answer, self.p).to(batch.inputs).unsqueeze(-2).expand_as(batch.targets)


@dataclass(frozen=True, kw_only=True, slots=True)
class NoisedToy:
    """Denoising of a shared mean: m ~ N(0, 1) per example, inputs m + sigma z with z anew at every draw, target m.

    Loss per coordinate: 1 from nothing, sigma^2/(1 + sigma^2) from one's own input, with N for 1/sigma^2 -> N/sigma^2
    from all inputs: sigma^2/(N + sigma^2).
    """

    n: int = 7
    d: int = 2
    sigma: float = 1.0
    cutoff: float = 1.0
    relation: str = "alike"

    @property
    def d_in(self) -> int:
        return self.d

    @property
    def d_out(self) -> int:
        return self.d

    def rows(self, part: Part, n: int, generator: Generator) -> Rows:
        return Rows(columns={"mean": generator.fold(part).normal(n, self.d)})

    def statistics(self, rows: Rows) -> dict[str, Tensor]:
        mean = rows.columns["mean"]
        return {"center": mean.mean(0), "deviation": mean.std(0, correction=0)}

    def draw(self, rows: Rows, generator: Generator) -> Batch:
        signal = (rows.columns["mean"] - rows.statistics["center"]) / rows.statistics["deviation"]
        signal = signal.unsqueeze(-2).expand(*signal.shape[:-1], self.n, self.d)
        shape = signal.shape[generator.key.dim() :]  # one stream per member where rows lead with S
        inputs = signal + self.sigma * generator.normal(*shape, dtype=signal.dtype)
        return Batch(inputs=inputs, targets=signal, geometry={"positions": inputs})

    def relations(self, geometry: Mapping[str, Tensor], keys: Tensor | None) -> dict[str, Tensor]:
        return {"alike": exclude_self(self.distance(geometry, keys) < self.cutoff, keys)}

    def distance(self, geometry: Mapping[str, Tensor], keys: Tensor | None) -> Tensor:
        return pair_distance(geometry["positions"], keys)

    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        return mean_square_loss(prediction, batch)

    def floors(self) -> Floors:
        alone, together = (self.sigma**2 / (count + self.sigma**2) for count in (1, self.n))
        return Floors(trivial=1.0, without_attention=alone, optimum=together)

    def diagnose(self, predict: Predict, rows: Rows, generator: Generator) -> dict[str, Tensor]:
        return mean_loss(predict, self.draw(rows, generator))

    def alone(self, batch: Batch) -> Tensor:
        """The best predictor without attention: each token shrinks its own input."""
        return batch.inputs / (1 + self.sigma**2)

    def best(self, batch: Batch) -> Tensor:
        """The optimal predictor: the mean of all inputs, shrunk."""
        return (batch.inputs.mean(-2, keepdim=True) / (1 + self.sigma**2 / self.n)).expand_as(batch.inputs)
