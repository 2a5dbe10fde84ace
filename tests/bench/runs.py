"""What benchmarks of whole packs share: packs whose results go nowhere, and the parts of a probe step, one by one."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from cluster.pack import PackRun, build_probes, to_numpy
from cluster.plan import Nowhere
from cluster.sweep import Pack
from probes.probe import Measurement, Probe
from sim.pool import Pool
from tests.bench.measure import Call

GROUPS = {"every": "scores", "sparse": "sparse probes", "checkpoints": "probes at checkpoints"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Something that is done at probe steps. group: the kind it belongs to. times: how often in the whole training."""

    name: str
    group: str
    call: Call
    times: int


def prepare(pack: Pack, pool: Pool) -> PackRun:
    """The pack before its first step."""
    return PackRun(pack, pool, build_probes(pack.config, pool), Nowhere())


def parts(run: PackRun) -> Iterator[Part]:
    """All that a pack's probe steps do, each part by itself on the pack as it stands when called."""
    times = {"every": len(run.stops), "sparse": len(run.sparse), "checkpoints": len(run.kept)}
    for probe in run.probes:
        call = functools.partial(measure, run, probe)
        yield Part(name=probe.name, group=GROUPS[probe.when], call=call, times=times[probe.when])
    loss = functools.partial(validation_loss, run)
    yield Part(name="validation loss", group="validation", call=loss, times=times["every"])
    figures = functools.partial(system_figures, run)
    yield Part(name="system figures", group="system figures", call=figures, times=times["sparse"])


def measure(run: PackRun, probe: Probe) -> Measurement:
    """A probe's rows of all members."""
    return run.measure(probe, run.trainer.snapshot())


def validation_loss(run: PackRun) -> None:
    """The validation loss of all members."""
    run.measure_figures(run.trainer.snapshot(), False)


def system_figures(run: PackRun) -> None:
    """The system's own figures of all members, without the validation loss that a pack measures beside them."""
    snapshot, system = run.trainer.snapshot(), run.pack.config.system
    for cut in run.cuts:
        found = system.diagnose(snapshot.part(cut).predict, run.validation, run.stream.fold("diagnose"))
        for value in found.values():
            to_numpy(value)
