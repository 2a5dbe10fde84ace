"""The report: bounded, self-contained, honest about what is missing, replaced as a whole."""

import base64
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from cluster import findings, report
from cluster.analysis import analyze_member, tabulate
from cluster.figures import ratio_band, spread
from cluster.picture import make_scene
from cluster.report import MemberData, write_report
from cluster.sweep import Sweep
from sim.generator import Generator
from sim.particles import ParticleBox, ParticleSystem
from tests.planted_sweep import with_laws
from tests.toys import EnumeratedToy, MaskedToy
from train.config import ModelConfig, TrainConfig
from train.loop import probe_steps
from train.model import initial

LAST = 1000
STEPS = np.array(probe_steps(LAST, 20))
SPARSE = STEPS[[0, 24, -1]]
LAYERS, HEADS, REPLICATES = 2, 2, 4
NULL = 0.1
HOSTILE = "<script>alert('x')</script> & $\\frac{1}{"


def small_system(**changes):
    return ParticleSystem(box=ParticleBox(n=6, radius=0.1), restart=0.2, **changes)


def make_sweep(**changes):
    system = changes.pop("system", small_system())
    model = ModelConfig(width=8, layers=LAYERS, heads=HEADS)
    train = TrainConfig(steps=LAST)
    return replace(Sweep(name="planted", widths=(8, 16), seeds=3, system=system, model=model, train=train), **changes)


def lift_curve(kind, at):
    """Lift over the probe steps: reaches 2 at step `at`, half way up to 3; a transient comes back down."""
    x = np.log(np.maximum(STEPS, 0.5) / at)
    rise = 1 + 2 / (1 + np.exp(-x / 0.25))
    if kind == "transient":
        return 1 + (rise - 1) / (1 + np.exp((x - np.log(5)) / 0.1))
    return {"never": np.ones_like(x), "emerged": rise}[kind]


def grid(steps, relations, layers=LAYERS, heads=HEADS):
    index = np.indices((len(steps), layers, heads, len(relations), REPLICATES)).reshape(5, -1)
    return {
        "step": steps[index[0]],
        "wall_time": 1e9 + steps[index[0]].astype(float),
        "relation": np.array(relations)[index[3]],
        "layer": index[1].astype(np.int16),
        "head": index[2].astype(np.int16),
        "replicate": index[4].astype(np.int16),
    }


def make_curves(heads, relations=("collision", "near"), distance=True):
    """The long table of a member whose heads follow the planted curves: {(layer, head): (kind, step)}."""
    layers, width = max(k[0] for k in heads) + 1, max(k[1] for k in heads) + 1
    noise = np.random.default_rng(0)
    table = pd.DataFrame(grid(STEPS, relations, layers, width))
    lifts = np.ones((len(STEPS), layers, width))
    for key, (kind, at) in heads.items():
        lifts[:, key[0], key[1]] = lift_curve(kind, at)
    lift = np.broadcast_to(lifts[..., None, None], (*lifts.shape, len(relations), REPLICATES)).ravel()
    lift = lift * (1 + 0.01 * noise.standard_normal(lift.size))
    attention = table.assign(probe="attention", score=NULL * lift, null_uniform=NULL, null_rows=NULL)
    sparse = pd.DataFrame(grid(SPARSE, ("all", "free", "related"), layers, width))
    worth = np.where(sparse["step"] > 0, 0.02, np.nan)
    ablation = sparse.assign(probe="ablation", pattern=worth, ablation=worth, loss_without_attention=1.0)
    ablation["loss"] = 1.0 - 0.1 * np.log1p(ablation["step"])
    parts = [attention, ablation]
    if distance:
        shells = pd.DataFrame(grid(SPARSE, ("0.5", "1.5", "10.5"), layers, width))
        parts.append(shells.assign(probe="distance", g=1.0 + (shells["step"] > 0), G=0.0, corr=-0.25))
    return pd.concat(parts, ignore_index=True)


def make_figures():
    loss = 1 / (1 + STEPS / 100)
    return pd.DataFrame(
        {"step": STEPS, "wall_time": 1e9 + STEPS, "train_loss": loss, "validation_loss": loss, "accuracy": loss}
    )


def make_weights(sweep, width):
    model = replace(sweep.model, width=width)
    named = initial(model, sweep.system.d_in, sweep.system.d_out, Generator.stack([1]), torch.float32)
    return {f"{step}/{name}": value[0].numpy() for step in (0, LAST) for name, value in named.items()}


class Planted:
    """A finished, diverged or failed member for each entry {(axis values, seed): heads or (outcome, cause)}."""

    def __init__(self, sweep, plan, **curves):
        self.sweep, self.plan, self.curves, self.loads = sweep, {}, curves, []
        heads, members, lines = [], [], []
        for number, ((point, seed), what) in enumerate(plan.items()):
            keys = {"member_id": f"m{number}", "run_id": f"r{number}"}
            keys |= dict(zip(sweep.axis_names, point, strict=True), seed=seed)
            self.plan[f"r{number}"] = (point, what)
            if isinstance(what, tuple):
                members.append({**keys, "outcome": what[0], "cause": what[1]})
                continue
            own = analyze_member(make_curves(what, **curves), make_figures(), sweep.system.relation)
            head_rows, row, line = own
            heads += [{**keys, **head} for head in head_rows]
            lines += [{**keys, **each} for each in line]
            members.append({**keys, "outcome": "finished", "cause": "", **row})
        self.analysis = with_laws(sweep, tabulate(heads, members, sweep.axis_names, lines))

    def load(self, run_id):
        self.loads.append(run_id)
        point, heads = self.plan[run_id]
        return MemberData(
            curves=make_curves(heads, **self.curves), figures=make_figures(), weights=make_weights(self.sweep, point[0])
        )


def heads(*kinds):
    """Head (1, 0), (1, 1), (0, 0) in turn follow these; the rest never rise."""
    keys = [(1, 0), (1, 1), (0, 0), (0, 1)]
    padded = [*kinds, *[("never", 1)] * (len(keys) - len(kinds))]
    return dict(zip(keys, padded, strict=True))


@pytest.fixture(scope="module")
def planted():
    return Planted(
        make_sweep(),
        {
            ((8,), 0): heads(("emerged", 100)),
            ((8,), 1): heads(),
            ((8,), 2): ("diverged", "diverged at step 77"),
            ((16,), 0): heads(("transient", 40)),
            ((16,), 1): heads(("emerged", 90), ("emerged", 300)),
            ((16,), 2): ("failed", HOSTILE),
        },
    )


@pytest.fixture(scope="module")
def page(planted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted") / "report"
    links = {"compare": "http://127.0.0.1:5000/#/x", "<b>bad</b>": "javascript:alert(1)"}
    tables = ("heads", "members", "widths")
    before = {name: getattr(planted.analysis, name).copy() for name in tables}
    path = write_report(folder, planted.sweep, planted.analysis, planted.load, links, ["a <i>note</i>"])
    for name in tables:  # left as they were
        pd.testing.assert_frame_equal(before[name], getattr(planted.analysis, name))
    return path.read_text()


def panels(page):
    return sum(int(count) for count in re.findall(r'data-panels="(\d+)"', page))


def names(page):
    return re.findall(r'data-name="([^"]+)"', page)


def missing(page):
    return re.findall(r'<p class="missing">(.*?)</p>', page, re.DOTALL)


def test_every_figure_is_there_and_embedded(planted, page):
    assert names(page) == [
        "losses.png", "box.png", "heads_width8.png", "heads_width16.png", "widths.png", "laws.png", "distance.png",
        "worth.png",
    ]  # fmt: skip
    assert missing(page) == []
    assert panels(page) <= report.PANELS
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 8
    assert all(base64.b64decode(source.partition("base64,")[2])[1:4] == b"PNG" for source in sources)


def test_geometry_that_was_not_measured_is_not_spoken_of(page):
    assert "Degenerate geometry" not in page
    assert "degree k" not in page


def test_no_asset_is_fetched(page):
    assert not re.search(r'src="(?!data:)|<link|<script|@import|url\(', page)
    assert re.findall(r'href="([^#][^"]*)"', page) == ["http://127.0.0.1:5000/#/x"]


def test_planted_levels_and_counts_are_on_the_page(planted, page):
    assert "4 of 6 members finished training, 1 diverged, 1 failed." in page
    points = {point.label: point for point in findings.make_points(planted.sweep, planted.analysis)}
    assert points["width 8"].figures["level"] == pytest.approx(100, rel=0.03)
    assert points["width 16"].figures["level"] == pytest.approx(60, rel=0.03)  # geometric mean of 40 and 90
    for label, counts in {"width 8": (1, 4 + 4, 1), "width 16": (2, 8, 3)}.items():
        point, (having, total, risen) = points[label], counts
        level = findings.step_text(point.figures["level"])
        assert f"{having} of 2 finished members {'has' if having == 1 else 'have'} a detector" in page
        assert f"reached lift 2 at step {level} " in page
        assert f"{risen} of {total} heads ({risen / total:.0%}) rose." in page
    assert points["width 16"].count("transient") == 1
    assert "1 finished member without a detector" in page
    assert "2 members ended without a result" in page
    assert "diverged at step 77" in page


def test_hostile_text_is_escaped(page):
    assert "<script>" not in page
    assert "&lt;script&gt;alert" in page
    assert "<b>bad" not in page
    assert "<i>note" not in page
    assert 'href="javascript' not in page


def test_median_member_with_a_detector_stands_for_its_point(planted):
    points = findings.make_points(planted.sweep, planted.analysis)
    assert [point.representative["seed"] for point in points] == [0, 0]


def test_further_axes_label_points_and_series(tmp_path):
    sweep = make_sweep(widths=(8,), axes={"train.learning_rate": (0.001, 0.003)}, seeds=1)
    plan = {((8, rate), 0): heads(("emerged", 100)) for rate in (0.001, 0.003)}
    made = Planted(sweep, plan, distance=False)
    page = write_report(
        tmp_path / "report", sweep, made.analysis, lambda run: replace(made.load(run), weights={}), {}
    ).read_text()
    assert [text for text in missing(page) if "weights were not kept" in text]
    assert "width 8, train.learning_rate 0.003" in page
    assert "heads_width8_train.learning_rate0.003.png" in names(page)
    assert "train.learning_rate 0.001" in {point.series for point in findings.make_points(sweep, made.analysis)}
    assert panels(page) <= report.PANELS
    assert "without an interval" in page


def test_without_a_finished_member_the_page_says_so(tmp_path):
    sweep = make_sweep()
    made = Planted(sweep, {((8,), 0): ("failed", "out of memory")})
    page = write_report(tmp_path / "lost", sweep, made.analysis, made.load, {}).read_text()
    assert names(page) == [] and len(missing(page)) == 6 and made.loads == []
    assert "0 of 6 members finished training, 0 diverged, 1 failed, 5 without a result yet." in page
    assert "out of memory" in page
    empty = tabulate([], [], sweep.axis_names)
    page = write_report(tmp_path / "empty", sweep, empty, made.load, {}).read_text()
    assert "6 without a result yet" in page


def test_system_without_positions_or_distance(tmp_path):
    sweep = make_sweep(system=EnumeratedToy(), widths=(8,), seeds=1)
    made = Planted(sweep, {((8,), 0): heads(("emerged", 100))}, relations=("operand",), distance=False)
    page = write_report(tmp_path / "report", sweep, made.analysis, made.load, {}).read_text()
    assert names(page) == ["losses.png", "heads_width8.png", "widths.png", "worth.png"]
    assert [text.partition(" ")[0] for text in missing(page)] == ["A", "There"]


def test_without_detectors_there_is_no_box(tmp_path):
    sweep = make_sweep(widths=(8,), seeds=1)
    made = Planted(sweep, {((8,), 0): heads()})
    page = write_report(tmp_path / "report", sweep, made.analysis, made.load, {}).read_text()
    assert "no detector of “collision” in the one finished member" in page
    assert [text for text in missing(page) if "no head to look through" in text]
    assert "widths.png" in names(page)


def test_large_sweeps_stay_bounded(planted, tmp_path):
    widths = tuple(range(8, 8 * 26, 8))
    sweep = make_sweep(widths=widths, seeds=20)
    keep = planted.analysis.members["member_id"] == "m4"
    own = planted.analysis.heads
    own = own[(own["member_id"] == "m4") & (own["relation"] == "collision")]
    row = planted.analysis.members[keep].to_dict("records")[0]
    head_rows, members = [], []
    for number, (width, seed) in enumerate((w, s) for w in widths for s in range(20)):
        keys = {"member_id": f"m{number}", "run_id": f"r{number}", "width": width, "seed": seed}
        members.append({**row, **keys, "level": row["level"] * (1 + 0.01 * seed)})
        head_rows += [{**head, **keys} for head in own.to_dict("records")]
    members[3] |= {"outcome": "failed", "cause": "x" * 10_000}
    loads = []

    def load(run_id):
        loads.append(run_id)
        width = widths[int(run_id[1:]) // 20]
        return MemberData(
            curves=make_curves(heads(("emerged", 90))), figures=make_figures(), weights=make_weights(sweep, width)
        )

    path = write_report(tmp_path / "report", sweep, tabulate(head_rows, members, sweep.axis_names), load, {})
    assert len(loads) == len(set(loads)) <= report.MEMBERS
    assert panels(path.read_text()) <= report.PANELS
    assert sum(file.stat().st_size for file in path.parent.iterdir()) <= 5_000_000
    assert "13 further points are in the tables below." in path.read_text()
    assert "1,940 more rows are in heads.parquet." in path.read_text()


def test_many_layers_and_heads_stay_bounded(tmp_path):
    sweep = make_sweep(widths=(36,), seeds=1, model=ModelConfig(width=36, layers=17, heads=9))
    many = {(layer, head): ("never" if head else "emerged", 90) for layer in range(17) for head in range(9)}
    made = Planted(sweep, {((36,), 0): many}, relations=("collision",), distance=False)
    page = write_report(tmp_path / "report", sweep, made.analysis, made.load, {}).read_text()
    assert panels(page) <= report.PANELS
    assert "strongest heads of a layer" in page
    assert panels(page) == 7 + 15 + 1


def test_an_error_on_the_way_leaves_the_old_report(planted, tmp_path):
    folder = tmp_path / "report"
    lost = Planted(planted.sweep, {((8,), 0): ("failed", "first")})
    before = write_report(folder, planted.sweep, lost.analysis, lost.load, {}).read_bytes()

    def broken(run_id):
        raise OSError("the store is gone")

    with pytest.raises(OSError, match="the store is gone"):
        write_report(folder, planted.sweep, planted.analysis, broken, {})
    assert (folder / "report.html").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_an_older_report_is_replaced_as_a_whole(tmp_path):
    sweep = make_sweep()
    made = Planted(sweep, {((8,), 0): ("failed", "first")})
    write_report(tmp_path / "report", sweep, made.analysis, made.load, {})
    (tmp_path / "report" / "stale.png").write_bytes(b"")
    write_report(tmp_path / "report", sweep, made.analysis, made.load, {}, ["second"])
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["report.html"]
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    made = Planted(make_sweep(), {((8,), 0): ("failed", "")})
    with pytest.raises(ValueError, match=r"folder: .* new, empty or an older report \(it holds thesis.tex\)"):
        write_report(tmp_path, made.sweep, made.analysis, made.load, {})
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_failing_rename_brings_the_old_folder_back(tmp_path):
    folder, fresh, old = (tmp_path / name for name in ("report", "fresh", "old"))
    folder.mkdir()
    (folder / "report.html").write_text("old")
    with pytest.raises(OSError):
        report.swap(fresh, folder, old)  # there is nothing to rename
    assert (folder / "report.html").read_text() == "old" and not old.exists()


def test_scene_holds_real_tokens_only():
    system, model = MaskedToy(), ModelConfig(width=8, layers=2, heads=2)
    sweep = make_sweep(system=system)
    scene = make_scene(system, model, make_weights(sweep, 8), (1, 0), "near")
    count = len(scene.positions)
    assert system.fewest <= count <= system.n
    assert [step for step, _ in scene.attention] == [0, LAST]
    for _, attention in scene.attention:
        assert attention.shape == (count, count)
        np.testing.assert_allclose(attention.sum(1), 1, rtol=1e-5)
    asked = scene.related.any(1)
    assert scene.uniform == pytest.approx((scene.related.sum(1) / count)[asked].mean())
    assert not scene.wrap.any() and scene.radius is None and scene.size is None


def test_ratio_band_is_that_of_the_mean_of_residuals():
    score = np.array([0.2, 0.3, 0.4, np.nan], dtype=np.float32)
    null = np.array([0.1, 0.1, 0.1, 0.1], dtype=np.float32)
    ratio, band = ratio_band(score, null)
    assert ratio == pytest.approx(3.0)
    assert band == pytest.approx(2 * np.std([2, 3, 4], ddof=1) / np.sqrt(3), rel=1e-5)


def test_evenly_keeps_the_ends():
    assert findings.evenly(range(10), 4) == [0, 3, 6, 9]
    assert findings.evenly("ab", 4) == ["a", "b"]
    assert findings.evenly("abc", 1) == ["a"]


@pytest.mark.parametrize("values", [[0.5, 0.5, 0.5], [0.0, 0.01, 1.0], [1.0, 1.0, 0.99, 0.2], [0.3]])
def test_spread_labels_are_apart_in_order_and_inside(values):
    placed = spread(values, 0.1)
    order = np.argsort(values, kind="stable")
    assert (np.diff(placed[order]) >= 0.1 - 1e-9).all()
    assert placed.min() >= -1e-9 and placed.max() <= 1 + 1e-9


def test_spread_leaves_labels_that_have_room():
    np.testing.assert_allclose(spread([0.9, 0.1, 0.5], 0.1), [0.9, 0.1, 0.5])


@pytest.mark.parametrize(
    ("value", "text"), [(1234.4, "1,234"), (12.34, "12.3"), (0.5, "0.5"), (float("nan"), "–"), (float("inf"), "∞")]
)
def test_step_text(value, text):
    assert findings.step_text(value) == text


def test_where_lift_cannot_rise_far_it_is_told(planted):
    """Uniform attention that gives related tokens a tenth, three tenths or six tenths of the weight."""

    def told(*factors):
        heads = planted.analysis.heads.copy()
        for width, factor in zip((8, 16), factors, strict=True):
            heads.loc[heads["width"] == width, "lift_peak"] /= factor
        changed = replace(planted.analysis, heads=heads)
        return findings.ceiling_lines(findings.make_points(planted.sweep, changed))

    assert told(1, 1) == []
    assert told(1, 3) == [
        "Uniform attention gives related tokens 10% of the weight at one point and 30% at another, so lift is at most "
        "10.0 and 3.3 there, and a level is not the same demand."
    ]
    assert told(3, 3) == ["Uniform attention already gives related tokens 30% of the weight, so lift is at most 3.3."]
    (line,) = told(1, 6)
    assert line.endswith("10.0 and 1.7 there: no head can reach lift 2 at 1 of 2 points.")
    assert told(6, 6) == [
        "Uniform attention already gives related tokens 60% of the weight, so lift is at most 1.7: no head can reach "
        "lift 2."
    ]
