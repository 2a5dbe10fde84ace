"""What is done with a finished sweep: exported, compared, cleaned; on a real SQLite ledger with a planted sweep."""

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import time

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from scipy import stats

from cluster import analysis as analyses
from cluster import clean, compare, tracking
from cluster.clean import CleanOptions, File, items
from cluster.cli import main
from cluster.compare import QUANTITIES, correlation, gap_interval, newcombe, take_side
from cluster.compare_page import cells, verdict, write_page
from cluster.export import unlike
from cluster.glossary import FIGURE, OWN, explain
from cluster.member_runs import MemberRuns
from cluster.store import FolderStore
from cluster.sweep import DataConfig, Pack, Sweep, validate, versions
from cluster.trial import to_parquet
from tests.planted_sweep import planted_sweep
from tests.test_report import Planted, heads, make_sweep
from train import checkpoint

LEVEL, RATE = QUANTITIES[1], "train.learning_rate"


@pytest.fixture(scope="module")
def ledger(tmp_path_factory, blank_store):
    """A folder with a ledger of one finished sweep, `planted`: widths 8 and 16, two seeds; one member has diverged."""
    folder = tmp_path_factory.mktemp("ledger")
    sweep = make_sweep(seeds=2)
    plan = {((width,), seed): heads(("emerged", 20 + 10 * seed)) for width in (8, 16) for seed in (0, 1)}
    plan[(16,), 1] = ("diverged", "diverged at step 31")
    made = Planted(sweep, plan)
    uri = f"sqlite:///{shutil.copy(blank_store, folder)}"
    held = tracking.open_sweep(tracking.connect(uri), uri, sweep)
    members = validate(sweep)
    runs = MemberRuns(held.place, Pack(members=members), "cpu")
    rows = made.analysis.members
    renamed = {}
    for member in members:
        row = rows[(rows["width"] == member.config.model.width) & (rows["seed"] == member.config.seed)].iloc[0]
        files = {"config.json": b"{}"}
        if row["outcome"] == "finished":
            data = made.load(row["run_id"])
            for name in ("curves", "figures"):
                table = getattr(data, name)
                files[f"{name}.parquet"] = to_parquet({column: table[column].to_numpy() for column in table})
        runs.finish(member, files, 31 if row["outcome"] == "diverged" else -1)
        renamed[row["member_id"]] = member
    runs.close()
    ids = dict(zip([member.id for member in members], runs.runs, strict=True))
    tables = {}
    for name in ("heads", "members", "detectors"):
        table = getattr(made.analysis, name).copy()
        table["member_id"] = [renamed[old].id for old in table["member_id"]]
        table["run_id"] = table["member_id"].map(ids)
        tables[name] = table
    analyses.save(held.client, held.place, dataclasses.replace(made.analysis, **tables))
    held.client.log_text(held.place.parent, "<html></html>", "report/report.html")
    held.close("FINISHED")
    return folder, sweep, held


@pytest.fixture
def here(ledger, monkeypatch, tmp_path):
    """The ledger's folder as the current one."""
    monkeypatch.chdir(ledger[0])
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return ledger[0]


def test_an_export_names_every_file_and_column_and_its_digests_hold(here, ledger, tmp_path, capsys):
    assert main(["export", "planted", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "3 members" in said
    assert "left out: llc.parquet" in said
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == {"manifest.json", *(entry["file"] for entry in manifest["files"])}
    assert files >= {"README.txt", "sweep.json", "laws.json", "curves.parquet", "members.parquet", "report/report.html"}
    for entry in manifest["files"]:
        content = (tmp_path / "out" / entry["file"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["bytes"], entry["sha256"])
        assert entry["about"]
        if entry["file"].endswith(".parquet"):
            table = pd.read_parquet(tmp_path / "out" / entry["file"])
            assert (len(table), list(table)) == (entry["rows"], [column["name"] for column in entry["columns"]])
            assert all(column["about"] and column["about"] != OWN for column in entry["columns"]), entry["file"]
            assert {c["name"] for c in entry["columns"] if c["about"] == FIGURE} <= {"accuracy"}
    assert manifest["results versions"] == versions()
    assert manifest["code"] == tracking.code_version()
    body = json.loads((tmp_path / "out" / "sweep.json").read_text())
    from cluster.encoding import decode

    assert decode(Sweep, body) == ledger[1]


def test_exported_curves_are_those_of_the_members_one_row_group_each(here, ledger, tmp_path):
    assert main(["export", "planted", str(tmp_path / "out")]) == 0
    curves, members = (pd.read_parquet(tmp_path / "out" / f"{name}.parquet") for name in ("curves", "members"))
    assert pq.read_metadata(tmp_path / "out" / "curves.parquet").num_row_groups == 3
    assert list(curves["member_id"].unique()) == list(members.loc[members["outcome"] == "finished", "member_id"])
    for run, own in curves.groupby("run_id"):
        stored, _ = analyses.read_tables(ledger[2].client, run)
        pd.testing.assert_frame_equal(own.drop(columns=["member_id", "run_id", "width", "seed"]).reset_index(drop=True),
                                      stored, check_dtype=False)  # fmt: skip
        row = members[members["run_id"] == run].iloc[0]
        assert (own["width"].unique().tolist(), own["seed"].unique().tolist()) == ([row["width"]], [row["seed"]])


def test_an_export_replaces_its_own_and_nothing_else(here, tmp_path, capsys):
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    assert main(["export", "planted", str(target)]) == 2
    assert f"export: '{target}' is not allowed; it must be new, empty, or an older export" in capsys.readouterr().err
    assert [path.name for path in target.iterdir()] == ["mine.txt"]
    (target / "mine.txt").unlink()
    assert main(["export", "planted", str(target)]) == 0
    (target / "sweep.json").write_text("changed")
    assert main(["export", "planted", str(target)]) == 0
    assert (target / "sweep.json").read_text() != "changed"
    (target / "report" / "mine.txt").write_text("mine")
    assert main(["export", "planted", str(target)]) == 2
    assert "(it holds report/mine.txt)" in capsys.readouterr().err
    assert (target / "report" / "mine.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing temporary is left


def test_an_export_that_fails_leaves_nothing(here, ledger, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cluster.export.describe", lambda *given: (_ for _ in ()).throw(ValueError("no more")))
    assert main(["export", "planted", str(tmp_path / "out")]) == 2
    assert "headway: no more" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    for arguments in (["export", "planted"], ["export"], ["export", "--out", "x"]):
        assert main(arguments) == 2
        assert "it takes a sweep and a folder" in capsys.readouterr().err


def test_tables_of_two_moments_are_told_apart(here, ledger, tmp_path, capsys):
    """Runs that count now, against those of an analysis and of a geometry that were written before."""
    made = planted_sweep(seeds=4, widths=(16,), rates=(0.001,))
    table = made.members.assign(run_id=list("abcd"), outcome=["finished"] * 3 + ["diverged"])
    llc = pd.DataFrame({"run_id": ["a", "b", "c"]})
    older = dataclasses.replace(made, members=table, llc=llc)
    assert unlike(older, {"a", "b", "c"}) == []
    (later,) = unlike(older, {"a", "b", "c", "e", "f"})
    assert later.startswith("2 members in all tables but curves and figures: finished after the analysis")
    gone, *_ = unlike(older, {"a", "b"})
    assert gone.startswith("1 member in curves and figures: the analysis is of runs that no longer count")
    (rest,) = unlike(dataclasses.replace(older, llc=llc[:1]), {"a", "b", "c"})
    assert rest.startswith("2 of 3 members in llc and degrees: not measured, or measured before")
    assert unlike(dataclasses.replace(older, llc=llc[:0]), {"a", "b", "c"}) == [
        "llc.parquet, degrees.parquet: `headway probe llc` has measured none"
    ]
    _, sweep, held = ledger
    runs = MemberRuns(held.place, Pack(members=validate(dataclasses.replace(sweep, seeds=3))[-1:]), "cpu")
    runs.close()
    stored = held.client.search_runs([held.place.experiment], "status = 'FINISHED' and tags.kind = 'member'")[0]
    folder = held.client.download_artifacts(stored.info.run_id, "", str(tmp_path))
    held.client.log_artifacts(runs.runs[0], folder)
    held.client.set_terminated(runs.runs[0], "FINISHED")
    assert main(["export", "planted", str(tmp_path / "out")]) == 0
    assert "left out: 1 member in all tables but curves and figures" in capsys.readouterr().out
    held.client.delete_run(runs.runs[0])


def test_a_column_is_explained_by_table_axis_or_as_a_figure():
    assert explain("members", RATE, (RATE,)) == ("", "axis of the sweep: this field of the config")
    assert explain("curves", "head", ("width",))[1] == "from 0, in its layer"
    assert explain("members", "miss", ("width",))[1] == FIGURE
    assert explain("curves", "sharpness", ("width",))[1] == OWN


def side(label, analysis, sweep, chosen=""):
    return take_side(label, sweep, analysis, chosen)


def swept(seeds=8, rates=(0.001, 0.004), widths=(16, 64), **data):
    return Sweep(name="s", widths=widths, seeds=seeds, axes={RATE: rates}, data=DataConfig(**data))


def row_of(rows, item, point):
    (row,) = [row for row in rows if row.quantity == item.words and row.point == point]
    return row


def test_a_planted_difference_is_shown_where_it_is_and_its_size_is_right():
    """Levels are 300 (w / 32)^-g: g = 0.5 against 1.5 makes B / A = 2 at width 16, 1/2 at width 64, and 1 at 32."""
    analysis = planted_sweep(exponents=(0.5, 1.5), widths=(16, 32, 64), seeds=10, share=1.0)
    sweep = swept(seeds=10, widths=(16, 32, 64))
    a, b = side("A", analysis, sweep, f"{RATE}=0.001"), side("B", analysis, sweep, f"{RATE}=0.004")
    rows = compare.compare(a, b)
    for width, ratio, shown in ((16, 2.0, True), (32, 1.0, False), (64, 0.5, True)):
        row = row_of(rows, LEVEL, f"width {width}")
        assert row.gap[1] < ratio < row.gap[2]
        assert row.shown == shown
        assert row.n_a == row.n_b == 10
    assert row_of(rows, QUANTITIES[0], "width 16").a[0] == 1.0
    assert compare.differences(a, b) == [(RATE, "0.001", "0.004")]
    assert f"{LEVEL.words}: B is higher at 1 and lower at 1 of 3 points; shown." in verdict(rows)


def test_nothing_is_shown_between_a_sweep_and_itself():
    analysis, sweep = planted_sweep(seeds=4, widths=(16, 64)), swept(seeds=4)
    a, b = side("A", analysis, sweep), side("B", analysis, sweep)
    rows = compare.compare(a, b)
    assert not any(row.shown for row in rows)
    assert compare.differences(a, b) == []
    assert {row.point for row in rows} >= {f"width 16, {RATE} 0.001"}


def test_seeds_that_share_their_data_are_paired():
    """A common effect of the seed hides a small difference, but for those who take it off."""
    rng = np.random.default_rng(3)
    analysis = planted_sweep(exponents=(0.0, 0.0), widths=(32,), seeds=8, share=1.0)
    luck = {seed: 0.8 * rng.standard_normal() for seed in range(8)}
    table = analysis.members.copy()
    shift = np.where(table[RATE] == 0.004, 0.2, 0.0) + 0.02 * rng.standard_normal(len(table))
    table["level"] = 300 * np.exp(table["seed"].map(luck).to_numpy() + shift)
    analysis = dataclasses.replace(analysis, members=table)
    found = {}
    for order in ("seed", "member"):
        sweep = swept(widths=(32,), order=order)
        a, b = side("A", analysis, sweep, f"{RATE}=0.001"), side("B", analysis, sweep, f"{RATE}=0.004")
        assert compare.is_paired(a, b) == (order == "seed")
        found[order] = row_of(compare.compare(a, b), LEVEL, "all members")
    assert found["seed"].p < 0.01 < 0.3 < found["member"].p
    for row in found.values():
        assert row.gap[1] < math.exp(0.2) < row.gap[2]
    assert found["seed"].gap[2] / found["seed"].gap[1] < 1.1 < found["member"].gap[2] / found["member"].gap[1]


def test_whether_and_when_tells_those_that_never_get_there():
    analysis = planted_sweep(exponents=(0.5, 0.5), widths=(32,), seeds=10, share=1.0)
    table = analysis.members.copy()
    table.loc[(table[RATE] == 0.004) & (table["seed"] < 8), "level"] = np.nan
    analysis = dataclasses.replace(analysis, members=table)
    sweep = swept(seeds=10, widths=(32,))
    rows = compare.compare(*(side(n, analysis, sweep, f"{RATE}={v}") for n, v in (("A", "0.001"), ("B", "0.004"))))
    (later,) = [row for row in rows if row.quantity == compare.LATER]
    assert later.shown
    assert row_of(rows, QUANTITIES[0], "all members").b[0] == pytest.approx(0.2)
    assert "fewer than" not in row_of(rows, QUANTITIES[0], "all members").reason
    assert (row_of(rows, LEVEL, "all members").n_a, row_of(rows, LEVEL, "all members").n_b) == (10, 2)


def test_intervals_of_differences_are_those_of_the_books(monkeypatch):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal(7), 2 * rng.standard_normal(5) + 1
    expected = stats.ttest_ind(b, a, equal_var=False).confidence_interval(0.9)
    assert gap_interval(a, b, False)[1:] == pytest.approx((expected.low, expected.high))
    paired = stats.ttest_rel(b, a[:5]).confidence_interval(0.9)
    assert gap_interval(a[:5], b, True)[1:] == pytest.approx((paired.low, paired.high))
    monkeypatch.setattr(compare, "CONFIDENCE", 0.95)
    ones = [np.repeat([1.0, 0.0], [k, n - k]) for k, n in ((48, 80), (56, 70))]
    assert newcombe(*ones, False) == pytest.approx(
        (0.2, 0.0524, 0.3339), abs=5e-5
    )  # Newcombe 1998, table II, method 10


def test_sides_that_share_few_of_their_seeds_are_paired_by_these():
    """A common effect of the seed, and B with a quarter of A's seeds: all are cut to these."""
    rng = np.random.default_rng(5)
    analysis = planted_sweep(exponents=(0.0, 0.0), widths=(32,), seeds=16, share=1.0)
    table = analysis.members
    table = table[(table[RATE] == 0.001) | (table["seed"] % 4 == 1)].copy()
    luck = 0.8 * rng.standard_normal(16)
    shift = np.where(table[RATE] == 0.004, 0.2, 0.0) + 0.02 * rng.standard_normal(len(table))
    table["level"] = 300 * np.exp(luck[table["seed"]] + shift)
    sweep = swept(seeds=16, widths=(32,), order="seed")
    analysis = dataclasses.replace(analysis, members=table)
    a, b = side("A", analysis, sweep, f"{RATE}=0.001"), side("B", analysis, sweep, f"{RATE}=0.004")
    rows = compare.compare(a, b)
    row = row_of(rows, LEVEL, "all members")
    assert (row.n_a, row.n_b, row.pairs, row.p) == (16, 4, 4, 0.125)  # 2 of 2^4 arrangements are as far apart
    assert row.gap[1] < math.exp(0.2) < row.gap[2] < 1.1 * row.gap[1]
    assert cells(row)[2] == "16, 4; 4 in pairs"
    (later,) = [row for row in rows if row.quantity == compare.LATER]
    assert later.pairs == 4
    words = compare.design(a, b, rows)
    assert words.startswith("within each seed that both sides have (pairs)")
    assert "between" not in words
    apart = table.copy()
    apart.loc[apart[RATE] == 0.004, "seed"] += 100
    b = side("B", dataclasses.replace(analysis, members=apart), sweep, f"{RATE}=0.004")
    rows = compare.compare(a, b)
    assert {row.pairs for row in rows} == {0}
    words = compare.design(a, b, rows)
    assert words == "between the two sides: seeds share their data order, but none has a value on both"
    own = swept(seeds=16, widths=(32,), order="member")
    sides = (dataclasses.replace(each, sweep=own) for each in (a, b))
    assert compare.design(*sides, rows) == "between the two sides, as their seeds share no data order"
    some = table.copy()  # four seeds in common, of which none has a detector on both sides
    some.loc[(some[RATE] == 0.001) & some["seed"].isin((1, 5, 9, 13)), "level"] = np.nan
    analysis = dataclasses.replace(analysis, members=some)
    a, b = side("A", analysis, sweep, f"{RATE}=0.001"), side("B", analysis, sweep, f"{RATE}=0.004")
    rows = compare.compare(a, b)
    assert (row_of(rows, LEVEL, "all members").pairs, row_of(rows, QUANTITIES[0], "all members").pairs) == (0, 4)
    words = compare.design(a, b, rows)
    assert "in rows that tell how many are in pairs; between the two sides in the others" in words
    assert "4 in pairs" in cells(row_of(rows, QUANTITIES[0], "all members"))[2]


def test_the_interval_of_a_difference_of_paired_shares_covers_it():
    """Exactly, over all outcomes of 12 pairs: about the nominal share, however A and B depend; unpaired ones miss."""
    n, found = 12, []
    counts = np.array([c for c in np.ndindex((n + 1,) * 3) if sum(c) <= n])
    for cells_ in ((0.6, 0.2, 0.1), (0.45, 0.25, 0.05), (0.1, 0.5, 0.2)):
        cells4 = np.array([*cells_, 1 - sum(cells_)])  # both, A alone, B alone, neither
        full = np.column_stack([counts, n - counts.sum(1)])
        chance = stats.multinomial(n, cells4).pmf(full)
        held = []
        for count in full:
            a, b = (np.repeat(kind, count) for kind in (np.array([1.0, 1, 0, 0]), np.array([1.0, 0, 1, 0])))
            gap, low, high = newcombe(a, b, True)
            assert gap == pytest.approx((count[2] - count[1]) / n)
            held.append(low <= cells4[2] - cells4[1] <= high)
        found.append(float(chance @ np.array(held)))
    assert min(found) > 0.87, found
    assert max(found) < 0.97


def test_a_correlation_of_shares_narrows_or_widens_the_interval():
    a, b = np.repeat([1.0, 0.0], [10, 10]), np.repeat([1.0, 0.0], [8, 12])
    assert correlation(a, np.tile([1.0, 0.0], 10)) == 0.0
    assert newcombe(a, np.tile([1.0, 0.0], 10), True) == newcombe(a, np.tile([1.0, 0.0], 10), False)
    assert 0 < correlation(a, b) < np.corrcoef(a, b)[0, 1]  # drawn towards 0
    assert correlation(a, 1 - b) == pytest.approx(-np.corrcoef(a, b)[0, 1])
    widths = [np.ptp(newcombe(a, other, paired)[1:]) for other, paired in ((b, True), (b, False), (1 - b, True))]
    assert widths[0] < widths[1] < widths[2]
    assert correlation(np.ones(5), np.array([1.0, 0, 1, 0, 1])) == 0.0


REFUSED = [
    ("width=17", "", "A: width: '17' is not allowed; it must be one of 16, 64"),
    ("wide=16", "", "A: 'wide' is unknown; did you mean 'width'?"),
    ("width", "", "A: 'width' is not allowed; it must be AXIS=VALUE"),
    ("width=16", "", r"B: width has 2 values \(16, 64\) and the other side one or none; choose one: s-\w+@width=16"),
]


@pytest.mark.parametrize(("chosen", "other", "message"), REFUSED)
def test_sides_that_cannot_be_compared_are_refused(chosen, other, message):
    analysis, sweep = planted_sweep(widths=(16, 64), seeds=2), swept(seeds=2)
    with pytest.raises(ValueError, match=message) as caught:
        compare.compare(side("A", analysis, sweep, chosen), side("B", analysis, sweep, other))
    assert "\n" not in str(caught.value)


def test_two_points_of_the_ledger_are_put_on_a_page(here, capsys):
    assert main(["compare", "planted@width=8", "planted@width=16"]) == 0
    said = capsys.readouterr().out
    assert "model.width: 8 against 16" in said
    page = re.search(r"page:\s+(\S+)", said).group(1)
    folder = here / "headway-out" / "compare" / "planted-width=8_planted-width=16"
    assert page == str(folder / "compare.html")
    text = (folder / "compare.html").read_text()
    assert "What differs in the configs" in text
    assert "data:image/png;base64," in text
    table = pd.read_parquet(folder / "compare.parquet")
    assert len(table) == len(QUANTITIES) + 1
    assert not table["shown"].any()
    assert table["reason"].str.contains("fewer than 4").any()
    (folder / "mine").touch()
    assert main(["compare", "planted@width=8", "planted@width=16"]) == 2
    assert "it must be new, empty or an older comparison" in capsys.readouterr().err
    shutil.rmtree(folder)
    assert main(["compare", "planted"]) == 2
    assert "it takes two sweeps or points" in capsys.readouterr().err


def test_many_points_fit_a_page(tmp_path):
    analysis, sweep = planted_sweep(seeds=2), swept(seeds=2, widths=(16, 24, 40, 64))
    a, b = side("A", analysis, sweep), side("B", analysis, dataclasses.replace(sweep, name="other"))
    rows = compare.compare(a, b)
    page = write_page(tmp_path / "page", a, b, rows, compare.differences(a, b)).read_text()
    assert page.count("<tr>") == 2 + 1 + len(rows)  # two heads, the one field that differs, and all rows
    assert "<td>name</td><td>s</td><td>other</td>" in page


# checkpoints that may go


def kept(files, pack, members, step, days=0.0):
    """A checkpoint of so many days ago."""
    checkpoint.save(files, pack, members, step, {"state/x": np.zeros((len(members), 1000))}, versions())
    for name in files.names(checkpoint.FOLDER):
        if f"{pack}-{step:09d}" in name:
            then = time.time() - days * clean.DAY
            os.utime(files.root / name, (then, then))


def chosen(root, settled=(), running=(), **options):
    """What would go, as (name, why)."""
    found = items("s", str(root), list(clean.listing(str(root))), settled, running)
    doomed = clean.choose(found, CleanOptions(**options), time.time())
    return {(re.sub(r"checkpoints/|\.json$", "", item.files[0]), item.why) for item in doomed}


def test_what_nobody_needs_goes_and_the_rest_by_age_and_budget(tmp_path):
    files = FolderStore(tmp_path)
    kept(files, "done", ["a", "b"], 10, days=3)
    kept(files, "half", ["a", "c"], 10, days=2)
    kept(files, "half", ["a", "c"], 20, days=1)
    kept(files, "busy", ["d"], 10, days=5)
    kept(files, "busy", ["d"], 20, days=4)
    for name, hours in ((".x.npz.0123", 2), ("lone-000000001.npz", 2), (".y.npz.4567", 0)):
        path = tmp_path / "checkpoints" / name
        path.write_bytes(b"1")
        os.utime(path, (time.time() - 3600 * hours,) * 2)
    always = {("done-000000010", clean.DONE), (".x.npz.0123", clean.LEFT), ("lone-000000001.npz", clean.LEFT)}
    assert chosen(tmp_path, {"a", "b"}, {"d"}) == always
    assert chosen(tmp_path, {"a", "b"}, {"d"}, older_than=1.5) == always | {
        ("half-000000010", clean.OLD), ("busy-000000010", clean.OLD),
    }  # fmt: skip
    assert chosen(tmp_path, {"a", "b"}, older_than=0.5) - always == {
        (f"{pack}-{step:09d}", clean.OLD) for pack in ("half", "busy") for step in (10, 20)
    }
    size = sum(file.size for file in clean.listing(str(tmp_path)) if "half-000000020" in file.name)
    assert chosen(tmp_path, {"a", "b"}, {"d"}, budget=2.7 * size / 1e9) - always == {("busy-000000010", clean.OVER)}
    assert chosen(tmp_path, {"a", "b"}, {"d"}, budget=0.0) - always == {
        ("half-000000010", clean.OVER), ("half-000000020", clean.OVER), ("busy-000000010", clean.OVER),
    }  # fmt: skip


def test_no_budget_takes_a_checkpoint_that_cannot_be_read(tmp_path):
    """Its manifest may be unreadable for now: only age takes it. It counts as room that is taken."""
    files = FolderStore(tmp_path)
    kept(files, "a", ["a"], 10, days=3)
    kept(files, "b", ["b"], 10, days=1)
    (tmp_path / "checkpoints" / "a-000000010.json").write_text("{")
    os.utime(tmp_path / "checkpoints" / "a-000000010.json", (time.time() - 3 * clean.DAY,) * 2)
    sizes = {file.name[12:13]: file.size for file in clean.listing(str(tmp_path)) if file.name.endswith(".npz")}
    room = 1.5 * (sizes["a"] + sizes["b"]) / 1e9
    assert chosen(tmp_path, budget=0.0) == {("b-000000010", clean.OVER)}
    assert chosen(tmp_path, budget=1.5 * sizes["b"] / 1e9) == {("b-000000010", clean.OVER)}
    assert chosen(tmp_path, budget=room) == set()
    assert chosen(tmp_path, older_than=2.0) == {("a-000000010", clean.OLD), ("a-000000010.npz", clean.OLD)}


def test_members_that_would_begin_anew_are_those_that_lose_their_furthest_point(tmp_path):
    files = FolderStore(tmp_path)
    kept(files, "p", ["a", "b"], 10)
    kept(files, "q", ["b"], 30)
    found = items("s", str(tmp_path), list(clean.listing(str(tmp_path))), {"z"}, set())
    assert {item.files[0][12:13]: item.unfinished for item in found} == {"p": {"a"}, "q": {"b"}}


def test_a_file_store_by_url_is_listed_like_a_folder(tmp_path):
    kept(FolderStore(tmp_path), "p", ["a"], 10)
    by_url = [dataclasses.replace(file, time=0.0) for file in clean.listing(tmp_path.as_uri())]
    assert by_url == [dataclasses.replace(file, time=0.0) for file in clean.listing(str(tmp_path))]
    assert {file.name for file in by_url} == {"checkpoints/p-000000010.json", "checkpoints/p-000000010.npz"}
    assert list(clean.listing(str(tmp_path / "none"))) == []
    assert isinstance(by_url[0], File)


def test_cleaning_asks_first_and_leaves_sweeps_that_are_held_alone(here, ledger, capsys, monkeypatch):
    _, sweep, held = ledger
    root = here / "headway-out" / sweep.id
    kept(FolderStore(root), "pack", [member.id for member in validate(sweep)], 10)
    assert main(["clean", "planted"]) == 2
    said = capsys.readouterr()
    assert "yes: False is not allowed; it must be given (--yes) where there is no terminal" in said.err
    assert clean.DONE in said.out
    assert len(list((root / "checkpoints").iterdir())) == 2
    monkeypatch.setattr(clean.sys.stdin, "isatty", lambda: True, raising=False)
    assert not clean.asked(Console(), [], lambda: "")
    assert clean.asked(Console(), [], lambda: "y ")
    held.client.set_tag(held.place.parent, "heartbeat", f"{time.time():.0f} somebody")
    assert main(["clean", "--yes"]) == 0
    assert "passed over: sweep planted-" in re.sub(r"\s+", " ", capsys.readouterr().out)
    assert len(list((root / "checkpoints").iterdir())) == 2
    held.client.set_tag(held.place.parent, "heartbeat", "")
    assert main(["clean", "--yes"]) == 0
    assert "deleted 2 files" in capsys.readouterr().out
    assert list((root / "checkpoints").iterdir()) == []
    assert main(["clean", "--yes"]) == 0
    assert "nothing to clean" in capsys.readouterr().out
    kept(FolderStore(root), "torn", [member.id for member in validate(sweep)], 10)
    (root / "checkpoints" / "torn-000000010.json").write_text("{")
    assert main(["clean", "--yes", "--budget", "0"]) == 0
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "2 files of checkpoints whose manifest cannot be read" in said
    assert "no budget takes these, as they may be sound" in said
    assert len(list((root / "checkpoints").iterdir())) == 2
    shutil.rmtree(root)
    for flags, message in (
        (["--older-than", "-1"], "older_than: -1.0 is not"),
        (["--budget", "nan"], "budget: nan is"),
    ):
        assert main(["clean", *flags]) == 2
        assert message in capsys.readouterr().err
    assert main(["clean", "nothing"]) == 2
    assert "sweep: 'nothing' is not in the ledger" in capsys.readouterr().err
