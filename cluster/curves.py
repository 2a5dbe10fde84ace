"""What a pack has measured so far, as dense arrays that cut and merge by member."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probes.probe import Measurement

Array = NDArray[Any]
Columns = dict[str, Array]

KEYS = ("step", "wall_time", "probe", "relation", "layer", "head", "replicate")


@dataclass(kw_only=True, slots=True)
class ProbeCurve:
    """One probe's values over the steps at which it ran.

    relations: its Q names. steps `[T]`. wall_time `[T][S]`, Unix seconds. values: `[T][S, L, H, Q, R]` by column.
    """

    relations: tuple[str, ...] = ()
    steps: list[int] = field(default_factory=list)
    wall_time: list[Array] = field(default_factory=list)
    values: dict[str, list[Array]] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class Curves:
    """All tables of a pack of S members: head curves by probe, and losses and system figures by step.

    figures: `[T][S]` by name, with `figure_steps [T]` and `figure_times [T][S]`; NaN where not measured at a step.
    weights: `[S, P]` by step, in the order of `train.model.tensor_specs`.
    """

    members: int
    probes: dict[str, ProbeCurve] = field(default_factory=dict)
    figure_steps: list[int] = field(default_factory=list)
    figure_times: list[Array] = field(default_factory=list)
    figures: dict[str, list[Array]] = field(default_factory=dict)
    weights: dict[int, Array] = field(default_factory=dict)

    @property
    def last_step(self) -> int:
        """The last probe step on record, -1 before the first."""
        return self.figure_steps[-1] if self.figure_steps else -1

    def add(self, probe: str, step: int, time: float, measurement: Measurement) -> None:
        """Append what a probe measured."""
        curve = self.probes.setdefault(probe, ProbeCurve(relations=measurement.relations))
        curve.steps.append(step)
        curve.wall_time.append(np.full(self.members, time))
        for column, value in measurement.values.items():
            if column in KEYS:
                raise ValueError(f"{probe}: column {column!r} is not allowed; it must not be one of {', '.join(KEYS)}")
            curve.values.setdefault(column, []).append(value)

    def add_figures(self, step: int, time: float, figures: Mapping[str, Array]) -> None:
        """Append losses and system figures `[S]` of one step."""
        for name in self.figures.keys() | figures.keys():
            empty = [np.full(self.members, np.nan) for _ in self.figure_steps]
            self.figures.setdefault(name, empty).append(figures.get(name, np.full(self.members, np.nan)))
        self.figure_steps.append(step)
        self.figure_times.append(np.full(self.members, time))

    def to_arrays(self) -> Columns:
        """Every array with the member axis first, by a name that `from_arrays` reads."""
        arrays: Columns = {"figures/steps": np.array(self.figure_steps)}
        arrays |= {"figures/times": _stack(self.figure_times, self.members)}
        arrays |= {f"figures/value/{name}": _stack(value, self.members) for name, value in self.figures.items()}
        arrays |= {f"weights/{step}": value for step, value in self.weights.items()}
        for name, curve in self.probes.items():
            arrays[f"probe/{name}/relations"] = np.array(curve.relations)
            arrays[f"probe/{name}/steps"] = np.array(curve.steps)
            arrays[f"probe/{name}/times"] = _stack(curve.wall_time, self.members)
            arrays |= {f"probe/{name}/value/{col}": _stack(v, self.members) for col, v in curve.values.items()}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> Curves:
        """The inverse of `to_arrays`."""
        curves = cls(members=arrays["figures/times"].shape[0])
        curves.figure_steps = [int(step) for step in arrays["figures/steps"]]
        curves.figure_times = _unstack(arrays["figures/times"])
        for name, value in arrays.items():
            match name.split("/"):
                case ["figures", "value", *rest]:
                    curves.figures["/".join(rest)] = _unstack(value)
                case ["weights", step]:
                    curves.weights[int(step)] = value
                case ["probe", probe, "relations"]:
                    curve = curves.probes.setdefault(probe, ProbeCurve())
                    curve.relations = tuple(str(relation) for relation in value)
                    curve.steps = [int(step) for step in arrays[f"probe/{probe}/steps"]]
                    curve.wall_time = _unstack(arrays[f"probe/{probe}/times"])
                case ["probe", probe, "value", column]:
                    curves.probes.setdefault(probe, ProbeCurve()).values[column] = _unstack(value)
        return curves

    def head_table(self, member: int) -> Columns:
        """One member's curves in long form: `KEYS`, then the columns of all probes, NaN where a probe lacks one."""
        columns = sorted({column for curve in self.probes.values() for column in curve.values})
        parts = [_long(name, curve, member, columns) for name, curve in self.probes.items()]
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]} if parts else {}

    def figure_table(self, member: int) -> Columns:
        """One member's losses and system figures: step, wall_time and one column each."""
        table: Columns = {
            "step": np.array(self.figure_steps),
            "wall_time": np.array([time[member] for time in self.figure_times]),
        }
        return table | {name: np.array([value[member] for value in values]) for name, values in self.figures.items()}


def member_axis_first(name: str) -> bool:
    """Whether the array that `to_arrays` gave under this name leads with members."""
    return not name.endswith(("/steps", "/relations"))


def take(arrays: Mapping[str, Array], index: Sequence[int]) -> Columns:
    """The members at `index` of what `Curves.to_arrays` gave."""
    return {name: value[list(index)] if member_axis_first(name) else value for name, value in arrays.items()}


def join(parts: Sequence[Mapping[str, Array]]) -> Columns:
    """One pack's arrays from several packs that were measured at the same steps; weights where all have kept them."""
    first = parts[0]
    names = [name for name in first if not name.startswith("weights/") or all(name in part for part in parts)]
    return {
        name: np.concatenate([part[name] for part in parts]) if member_axis_first(name) else first[name]
        for name in names
    }


def _stack(values: Sequence[Array], members: int) -> Array:
    return np.stack(values, axis=1) if values else np.zeros((members, 0))


def _unstack(value: Array) -> list[Array]:
    return [value[:, t] for t in range(value.shape[1])]


def _long(name: str, curve: ProbeCurve, member: int, columns: Sequence[str]) -> Columns:
    first = next(iter(curve.values.values()))
    shape = (len(curve.steps), *first[0].shape[1:])
    grid = np.indices(shape)

    def spread(values: Array) -> Array:
        return np.broadcast_to(values.reshape(-1, 1, 1, 1, 1), shape).ravel()

    missing = np.full(shape, np.nan, dtype=np.float32)
    keys: Columns = {
        "step": spread(np.array(curve.steps)),
        "wall_time": spread(np.array([time[member] for time in curve.wall_time])),
        "probe": np.full(grid[0].size, name),
        "relation": np.array(curve.relations)[grid[3].ravel()],
        "layer": grid[1].ravel().astype(np.int16),
        "head": grid[2].ravel().astype(np.int16),
        "replicate": grid[4].ravel().astype(np.int16),
    }
    values = {
        column: (np.stack([v[member] for v in curve.values[column]]) if column in curve.values else missing).ravel()
        for column in columns
    }
    return keys | values
