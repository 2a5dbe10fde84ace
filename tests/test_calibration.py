"""`headway probe calibrate`: a grid of chains' settings on one member."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from cluster import calibration
from cluster.calibration import Grid, calibrate_member, calibration_table, draw_calibration
from cluster.geometry import Kept, Subject
from cluster.pack import make_pool
from probes.llc import estimate_llcs
from tests.test_geometry import SWEEP
from train.model import tensor_specs
from train.refine import HeadTarget

CONFIG = SWEEP.members()[0].config
SUBJECT = Subject(member_id="m", run_id="r", name="n", config=CONFIG, heads=[], best_head="")
GRID = Grid(step_sizes=(1e-5, 10.0), gammas=(50.0, 500.0), n_beta=5.0, draws=8, burn_in=2, minibatch=4)


@pytest.fixture
def member(monkeypatch):
    """Weights at steps 0 and 60, no MLflow."""
    rng = np.random.default_rng(0)
    specs = tensor_specs(CONFIG.model, CONFIG.system.d_in, CONFIG.system.d_out)
    weights = {step: {name: rng.normal(0.0, 0.3, spec.shape) for name, spec in specs.items()} for step in (0, 60)}
    kept = Kept(weights=weights, figures=None)
    monkeypatch.setattr(Kept, "fetch", lambda client, run_id: kept)
    return kept


def test_the_grid_is_what_estimates_at_the_same_settings_are(member, monkeypatch):
    targets = []

    def noted(*args):
        targets.append((args, HeadTarget(*args)))
        return targets[-1][1]

    monkeypatch.setattr(calibration, "HeadTarget", noted)
    found = calibrate_member(None, SUBJECT, GRID)
    assert sorted(zip(found.gamma, found.step_size, strict=True)) == [
        (50.0, 1e-5), (50.0, 10.0), (500.0, 1e-5), (500.0, 10.0)
    ]  # fmt: skip
    (arguments, target), *_ = targets
    assert arguments[4:6] == ([(0, 0), (0, 1)], 1)  # all heads of the last layer
    torch.testing.assert_close(arguments[2]["1.Wq"][0], torch.from_numpy(member.weights[60]["1.Wq"]))  # the last step
    keys = [calibration.key_of("calibrate", "m", 60, 1, head) for head in range(2)]
    for index, (gamma, eps) in enumerate(zip(found.gamma, found.step_size, strict=True)):
        settings = replace(GRID.settings, gamma=gamma, step_size=eps)
        alone = estimate_llcs(target, keys, settings)
        np.testing.assert_allclose(found.llc[index], np.mean([llc.mean for llc in alone]), rtol=1e-6)
    assert found.acceptance[found.step_size == 10.0].max() < 0.9  # steps of 10 would not be accepted
    assert found.acceptance[found.step_size == 1e-5].min() > 0.9


def test_table_and_figure_tell_all_of_it(member):
    found = calibrate_member(None, SUBJECT, GRID)
    console = Console(width=120, record=True, quiet=True)
    console.print(calibration_table(found))
    table = calibration_table(found)
    assert table.row_count == 4
    bold = [row.style for row in table.rows].count("bold")
    assert bold == (found.chosen is not None)
    value, acceptance, _ = draw_calibration(found).axes
    drawn = np.concatenate([line.get_ydata() for line in acceptance.get_lines() if len(line.get_xdata()) == 2][:2])
    np.testing.assert_allclose(sorted(drawn), sorted(found.acceptance))
    assert [text.get_text() for text in draw_calibration(found).legends[0].get_texts()] == ["gamma 50", "gamma 500"]
    assert value.get_xscale() == "log"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": 2}, r"layer: 2 is not allowed; it must be in 0..1"),
        ({"checkpoint": 7}, r"checkpoint: 7 is not allowed; it must be one of 0, 60"),
        ({"gammas": ()}, r"gammas is \[\]; allowed: at least one"),
        ({"n_beta": -1.0}, r"n_beta is -1.0; allowed: a finite number above 0"),
    ],
)
def test_impossible_wishes_are_refused(member, changes, message):
    with pytest.raises(ValueError, match=message):
        calibrate_member(None, SUBJECT, replace(GRID, **changes))


def test_the_pool_is_the_members_own():
    assert len(make_pool(CONFIG).parts["probe"]) == 16
