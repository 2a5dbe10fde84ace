"""`headway probe transfer`: finished members on another system than they were trained on, as they are."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from mlflow.entities import Run
from rich.console import Console
from rich.table import Table

from cluster import tracking
from cluster.analysis import load_analysis, member_axes, number
from cluster.arguments import WORDS, StoreOptions, named, open_named
from cluster.driver import Desk, Settings
from cluster.encoding import set_field
from cluster.figures import COLOURS, INK, new_figure, save
from cluster.findings import interval
from cluster.geometry import Kept
from cluster.intervals import mean_interval
from cluster.measuring import find_subjects
from cluster.pack import make_pool, probe_batch, trivial_loss
from cluster.report import swap
from cluster.sweep import MemberConfig, Sweep, digest, part_sizes
from cluster.trial import pool_name
from probes.attention import AttentionScores, lift
from sim.checks import require
from sim.generator import Generator
from sim.system import Part, Rows
from train.neighbours import draw
from train.snapshot import Snapshot

PLACES = ("here", "there")
PARTS_USED: tuple[Part, ...] = ("validation", "probe")
KEYS = {"member_id", "run_id", "seed", "place", "step"}
REPLICATES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferOptions(StoreOptions):
    """Where to, and which members."""

    to: tuple[str, ...] = ()
    """Fields of the system that are other there, NAME=VALUE, for example swimmers.n=64."""
    examples: int = 256
    """Examples of each system."""
    widths: tuple[int, ...] = ()
    """Widths of the members. Default: all."""
    seeds: tuple[int, ...] = ()
    """Seeds of the members. Default: all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Transferred:
    """figures: a row by member and place, the loss, that of the best constant, and what the system diagnoses; heads: a
    row by member, head and relation, lift at both places; folder: where they lie as files, with a figure."""

    figures: pd.DataFrame
    heads: pd.DataFrame
    folder: Path


def transfer_sweep(desk: Desk, parent: Run, sweep: Sweep, options: TransferOptions) -> Transferred:
    """Measure finished members of a sweep there as here, in this process; tables and a figure, also to the ledger.

    ValueError, before anything is computed, for fields that the system has not, values that it does not allow, a system
    whose tokens have other numbers of inputs or outputs, and members that are not there.
    """
    client, place = desk.client, tracking.Place(uri=desk.uri, experiment=desk.experiment, parent=parent.info.run_id)
    require(options.examples >= 2 * REPLICATES, "examples", options.examples, f"at least {2 * REPLICATES}")
    changes = parse_changes(options.to)
    runs = tracking.counted(tracking.children(client, place))
    which = {"widths": options.widths, "seeds": options.seeds}
    analysis = load_analysis(client, place.parent)
    subjects = find_subjects(client, sweep, analysis, runs, which)
    others = [moved(each.config, changes) for each in subjects]
    most = min(part_sizes(each.config)[part] for each in subjects for part in PARTS_USED)
    require(options.examples <= most, "examples", options.examples, f"at most {most}, those kept from training")
    keys = member_axes([runs[each.member_id] for each in subjects], sweep, analysis)
    stock, figures, heads = Stock(options.examples), [], []
    for subject, other in zip(subjects, others, strict=True):
        home, kept = subject.config, Kept.fetch(client, subject.run_id)
        rows = stock.here(home), stock.there(home, other)
        own, by_head = measure(home, other, *rows, kept, options.examples)
        figures += [{**keys[subject.run_id], **row} for row in own]
        heads += [{**keys[subject.run_id], **row} for row in by_head]
    made = {"figures": pd.DataFrame(figures), "heads": pd.DataFrame(heads)}
    asked = [sorted(changes.items()), options.examples, sorted(each.run_id for each in subjects)]
    folder = desk.out / sweep.id / f"transfer-{digest(asked)}"
    write(folder, made, draw_transfer(made["figures"], made["heads"], sweep.system.relation))
    client.log_artifacts(place.parent, str(folder), folder.name)
    return Transferred(**made, folder=folder)


def parse_changes(items: Sequence[str]) -> dict[str, object]:
    """`swimmers.n=64` as a name and its value. ValueError for another form, none, or a repeated name."""
    require(len(items) > 0, "to", tuple(items), "one field or more that is other there, NAME=VALUE")
    changes: dict[str, object] = {}
    for item in items:
        name, equals, value = item.partition("=")
        require(bool(name and equals and value) and name not in changes, "to", item, "NAME=VALUE, each name once")
        changes[name] = WORDS.get(value, number(value))
    return changes


def moved(config: MemberConfig, changes: Mapping[str, object]) -> MemberConfig:
    """The member on the other system. ValueError where its network does not fit that."""
    system = set_field(config.system, changes, "to")
    for name, words in (("d_in", "that go in"), ("d_out", "that come out")):
        here, there = getattr(config.system, name), getattr(system, name)
        require(here == there, f"to ({name})", there, f"{here}, the numbers of a token {words} of the network")
    return replace(config, system=system)


class Stock:
    """Rows of the systems that members were trained on and of the others, each made once."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._made: dict[object, Mapping[Part, Rows]] = {}

    def here(self, home: MemberConfig) -> Mapping[Part, Rows]:
        """What the member was trained and judged on."""
        name = pool_name(home), home.train.dtype
        if name not in self._made:
            self._made[name] = make_pool(home).parts
        return self._made[name]

    def there(self, home: MemberConfig, other: MemberConfig) -> Mapping[Part, Rows]:
        """Rows of the other system, in the units of what was trained on, as the network knows no others."""
        name = pool_name(home), home.train.dtype, pool_name(other)
        if name not in self._made:
            units, stream = self.here(home)["train"].statistics, Generator.of("pool", other.data.seed)
            made: dict[Part, Rows] = {}
            for part in PARTS_USED:
                clean = other.system.rows(part, self._count, stream).to("cpu", other.train.dtype)
                made[part] = Rows(columns=clean.columns, statistics=units)
            self._made[name] = made
        return self._made[name]


def measure(
    home: MemberConfig,
    other: MemberConfig,
    here: Mapping[Part, Rows],
    there: Mapping[Part, Rows],
    kept: Kept,
    count: int,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A row of figures a place, and a row a head and relation, of the member as it was at its end."""
    step = list(kept.weights)[-1]
    parameters = kept.parameters([step], "cpu")
    figures, lifts = [], {}
    for place, config, rows in zip(PLACES, (home, other), (here, there), strict=True):
        snapshot = Snapshot(step=step, system=config.system, model=config.model, parameters=parameters)
        own = figures_of(config, snapshot, rows["validation"].take(slice(0, count)))
        figures.append({"place": place, "step": step, **own})
        lifts[place] = lifts_of(config, snapshot, rows["probe"], count // REPLICATES)
    heads = [
        {
            "layer": layer,
            "head": head,
            "relation": relation,
            **{f"lift_{place}": float(by_relation[relation][layer, head]) for place, by_relation in lifts.items()},
        }
        for relation in lifts[PLACES[0]].keys() & lifts[PLACES[1]]
        for layer, head in np.ndindex(home.model.layers, home.model.n_heads)
    ]
    return figures, sorted(heads, key=lambda row: (row["relation"], row["layer"], row["head"]))


def figures_of(config: MemberConfig, snapshot: Snapshot, rows: Rows) -> dict[str, float]:
    """Loss, that of the best constant, and what the system diagnoses."""
    system, stream = config.system, Generator.of("transfer", config.data.seed)
    batch = draw(system, config.model, rows, stream)
    real = torch.ones(batch.inputs.shape[:-1], dtype=torch.bool) if batch.mask is None else batch.mask
    found = {
        "loss": float(snapshot.loss(snapshot.predict(batch), batch).mean()),
        "trivial": trivial_loss(system, batch, real),
    }
    return found | {name: float(x) for name, x in system.diagnose(snapshot.predict, rows, stream.fold("d")).items()}


def lifts_of(config: MemberConfig, snapshot: Snapshot, rows: Rows, each: int) -> dict[str, np.ndarray[Any, Any]]:
    """Lift of every head by relation, `[L, H]`."""
    stream = Generator.of("transfer", "probe", config.data.seed)
    parts = [slice(index * each, (index + 1) * each) for index in range(REPLICATES)]
    batches = tuple(probe_batch(config, rows.take(part), stream.fold(i)) for i, part in enumerate(parts))
    found = AttentionScores(batches).measure(snapshot)
    by_relation = lift(found.values["score"], found.values["null_uniform"])[0]
    return {name: by_relation[..., index] for index, name in enumerate(found.relations)}


def write(folder: Path, tables: Mapping[str, pd.DataFrame], figure: Figure) -> None:
    """All of it under a temporary name, then renamed: the folder is of one call."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as work:
        fresh = Path(work) / "new"
        fresh.mkdir()
        for name, table in tables.items():
            table.to_parquet(fresh / f"{name}.parquet", index=False)
        save(figure, fresh / "transfer.png")
        swap(fresh, folder, Path(work) / "old")


def draw_transfer(figures: pd.DataFrame, heads: pd.DataFrame, relation: str) -> Figure:
    """Each member's loss here and there, and each head's lift there against here."""
    figure, ((losses, lifts),) = new_figure(1, 2, 3.4)
    for _, own in figures.groupby("run_id"):
        losses.plot(PLACES, own.set_index("place")["loss"][list(PLACES)], "o-", ms=4, lw=1, c=COLOURS[0])
    for place, value in figures.groupby("place")["trivial"].mean().items():
        at = PLACES.index(str(place))
        losses.hlines(value, at - 0.2, at + 0.2, color=INK, lw=0.8, ls=(0, (4, 3)))
    losses.set_ylabel("loss (dashed: of the best constant)", fontsize=9.5)
    losses.margins(x=0.3)
    own = heads[heads["relation"] == relation]
    ends = (0.0, 1.05 * float(np.nanmax(own[["lift_here", "lift_there"]].to_numpy(), initial=1.0)))
    lifts.plot(ends, ends, color=INK, lw=0.8, ls=(0, (4, 3)), zorder=0)
    lifts.plot(own["lift_here"], own["lift_there"], "o", ms=4, c=COLOURS[0], alpha=0.7)
    lifts.set_xlabel(f'lift of a head on "{relation}" here', fontsize=9.5)
    lifts.set_ylabel("there", fontsize=9.5)
    return figure


def point_table(done: Transferred, sweep: Sweep) -> Table:
    """Means over members by point, here and there, with 90% intervals."""
    names = [*sweep.axis_names]
    table = Table("", *names, "members", *PLACES)
    heads = done.heads[done.heads["relation"] == sweep.system.relation]
    diagnosed = [str(name) for name in done.figures if name not in {*names, *KEYS, "loss", "trivial"}]
    labels = {"loss": "loss", "trivial": "loss of the best constant", **{name: name for name in diagnosed}}
    for point, own in done.figures.groupby(names, sort=True):
        best = heads[heads["run_id"].isin(own["run_id"])].groupby("run_id")[["lift_here", "lift_there"]].max()
        shown = {text: [own.loc[own["place"] == place, name] for place in PLACES] for name, text in labels.items()}
        shown[f"highest lift of a head, {sweep.system.relation}"] = [best[f"lift_{place}"] for place in PLACES]
        for name, values in shown.items():
            cells = [interval(mean_interval(each.tolist()), ".3g") for each in values]
            table.add_row(name, *map(str, point), str(own["run_id"].nunique()), *cells)
        table.add_section()
    return table


def transfer_command(arguments: Sequence[str], console: Console) -> int:
    """`headway probe transfer`: a table, and where the rest lies."""
    text = (
        "Measure finished members, with the weights of their last step, on another system of the same kind, without "
        "training: loss, what the system diagnoses, and what heads look at, here and there."
    )
    (name,), options = named(arguments, TransferOptions(), "headway probe transfer", text)
    settings = Settings(tracking_uri=options.tracking_uri, out=options.out)
    desk, parent, sweep = open_named(name, settings)
    with console.status("making rows and measuring members"):
        done = transfer_sweep(desk, parent, sweep, options)
    console.print(f"here: as trained; there: {', '.join(options.to)}")
    console.print(point_table(done, sweep))
    console.print(f"tables and figure:  {done.folder}")
    return 0
