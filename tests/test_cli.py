"""The command as a user types it: help that teaches, plans, and bad input in one line with code 2, nothing started."""

import contextlib
import errno
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mlflow.exceptions import MlflowException
from optuna.exceptions import StorageInternalError

from cluster import cli, commands, dispatch, driver
from cluster.arguments import parse_axes
from cluster.cli import main
from cluster.sizing import Room
from cluster.tracking import BrokenOffError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A fresh folder, and a Ray that may not be started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def refuse(*args, **kwargs):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(dispatch.ray, "init", refuse)
    return tmp_path


BAD = [
    (
        ["sweep", "quick", "--axis", "sytem.box.n=8", "--axis", "train.steps=9"],
        "axes: 'sytem' is unknown; did you mean 'system'?",
    ),
    (["sweep", "quick", "--train.steps", "5"], "train.steps: 5 is not allowed"),
    (["sweep", "quick", "--workers", "2", "--address", "auto"], "workers: 2 is not allowed; it must be left out"),
    (["status"], "there is no ledger at"),
    (["swep", "quick"], "command: 'swep' is unknown; did you mean 'sweep'?"),
    (["sweep", "quikc"], "recipe: 'quikc' is unknown; did you mean 'quick'?"),
    (["sweep", "nothing.json"], "sweep: 'nothing.json' cannot be read"),
    (
        ["sweep", "quick", "--train.stepz", "5"],
        "Unrecognized options: --train.stepz, 5; Perhaps you meant: --train.steps",
    ),
    (["sweep", "quick", "--train.steps", "many"], "--train.steps: invalid literal for int() with base 10: 'many'"),
    (["sweep", "quick", "--train.steps", "0"], "steps: 0 is not allowed; it must be at least 1"),
    (
        ["sweep", "quick", "--train.learning-rate", "nan"],
        "learning_rate: nan is not allowed; it must be a finite number",
    ),
    (["sweep", "quick", "--train.optimizer", "lion"], "lion"),
    (["sweep", "quick", "--widths"], "widths: () is not allowed; it must be at least one width"),
    (["sweep", "quick", "--widths", "16", "16"], "widths: (16, 16) is not allowed; it must be without repeats"),
    (["sweep", "quick", "--widths", "18"], "width: 18 is not allowed; it must be a multiple of 4"),
    (["sweep", "quick", "--seeds", "0"], "seeds: 0 is not allowed; it must be at least 1"),
    (
        ["sweep", "quick", "--system.box.n", "60"],
        "box.n: 60 is not allowed; it must be so few that they fill at most 0.4",
    ),
    (
        ["sweep", "quick", "--system.box.restitution", "inf"],
        "restitution: inf is not allowed; it must be a finite number",
    ),
    (["sweep", "quick", "--axis", "train.lr=1,2"], "train: 'lr' is unknown"),
    (
        ["sweep", "quick", "--axis", "train.learning_rate"],
        "axis: 'train.learning_rate' is not allowed; it must be NAME=",
    ),
    (["sweep", "quick", "--axis", "train.learning_rate=fast"], "learning_rate: 'fast' is not allowed"),
    (["sweep", "quick", "--out", "/dev/null/x"], "out: '/dev/null/x' cannot be written"),
    (["sweep", "quick", "--store", "/dev/null/x"], "store: '/dev/null/x' cannot be written (Not a directory)"),
    (["sweep", "quick", "--store", "nonsense://x"], "store: 'nonsense://x' cannot be written"),
    (["sweep", "quick", "--pack-size", "0"], "pack_size: 0 is not allowed; it must be a finite number above 0"),
    (["sweep", "quick", "--tracking-uri", "http://127.0.0.1:9"], "no MLflow server answers at 'http://127.0.0.1:9'"),
    (["sweep", "quick", "--tracking-uri", "ftp://x"], "tracking_uri: 'ftp://x' is not allowed"),
    (["report", "nothing"], "there is no ledger at"),
    (["analyze"], "analyze: it takes a sweep, by name or id: headway analyze SWEEP"),
    (["ui", "--port", "high"], "--port"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_input_is_one_clear_line_and_code_2(arguments, message, capsys, elsewhere, blank_store):
    if "--store" in arguments:  # which is tried once there is a ledger
        shutil.copy(blank_store, elsewhere)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("headway: ")
    assert error.count("\n") == 1
    assert not any(path.is_file() for path in elsewhere.glob("headway-out/**/*"))
    if arguments[0] in ("report", "status"):
        assert list(elsewhere.iterdir()) == []


def test_help_teaches(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(command in said for command in cli.COMMANDS)
    assert main([]) == 2
    assert main(["sweep", "--help"]) == 0
    assert "quick" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["sweep", "quick", "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for flag in (
        "--widths",
        "--seeds",
        "--train.learning-rate",
        "--system.box.restitution",
        "--dry-run",
        "--axis",
        "--redo",
    ):
        assert flag in said
    assert "Constant rate after the warm-up" in said


def test_recipes_are_listed(capsys):
    assert main(["recipes"]) == 0
    said = capsys.readouterr().out
    assert "quick" in said
    assert "Two widths x four seeds" in said


def test_a_reader_that_has_seen_enough_is_no_error():
    command = f"{sys.executable} -m cluster.cli sweep quick --help | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.startswith("usage: headway sweep quick")
    assert done.stderr == ""


def test_version(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"headway \d+\.\d+\.\d+\n", capsys.readouterr().out)


FEW = ["--data.rows", "64", "--data.validation-rows", "16", "--probe.examples", "16", "--probe.sparse-examples", "8",
       "--system.box.n", "6", "--system.box.radius", "0.1"]  # fmt: skip


def test_a_dry_run_plans_and_starts_nothing(capsys, elsewhere):
    assert main(["sweep", "tiny", "--dry-run", "--seeds", "3", "--pack-size", "2", *FEW]) == 0
    said = capsys.readouterr().out
    assert "6 members to train (0 done), 4 packs" in said
    assert "Nothing was started." in said
    assert re.search(r"memory of the largest pack [\d.]+ [kMG]B", said)
    assert list(elsewhere.iterdir()) == []


def test_a_dry_run_for_gpus_of_another_machine_is_measured_on_a_cpu(capsys, elsewhere, monkeypatch):
    room, asked = Room(device="cuda", memory=5 << 30), []
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(commands, "ray_cluster", lambda address: asked.append(address) or contextlib.nullcontext())
    for name, found in (("settle_resources", {"GPU": 0.5}), ("slots", 3), ("find_room", room)):
        monkeypatch.setattr(commands, name, lambda *args, found=found: asked.append(args) or found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["sweep", "tiny", "--dry-run", "--seeds", "3", "--gpus", "0.5", *FEW]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "6 members to train (0 done), 6 packs on 3 workers" in said
    assert "measured here on short trials on a CPU, where workers have GPUs" in said
    assert "and has 5.37 GB" in said
    assert asked == [None, (0.5,), ({"GPU": 0.5},), ({"GPU": 0.5},)]


def test_a_request_that_the_cluster_can_never_meet_leaves_nothing(capsys, elsewhere, monkeypatch, blank_store):
    shutil.copy(blank_store, elsewhere)
    monkeypatch.setattr(driver, "ray_cluster", lambda *args: contextlib.nullcontext())
    monkeypatch.setattr(driver.ray, "nodes", lambda: [{"NodeID": "a", "Alive": True, "Resources": {"CPU": 2.0}}])
    assert main(["sweep", "tiny", "--gpus", "3"]) == 2
    said = capsys.readouterr().err
    assert said == "headway: gpus: 3.0 is not allowed; it must be at most 0, all that one node has\n"
    assert not any((elsewhere / "headway-out").iterdir())


def test_axes_from_the_command_line():
    assert parse_axes(["train.learning_rate=0.001,2", "model.parametrization=mup"]) == {
        "train.learning_rate": (0.001, 2),
        "model.parametrization": ("mup",),
    }
    with pytest.raises(ValueError, match="each name once"):
        parse_axes(["a=1", "a=2"])


def test_a_second_axis_flag_adds_to_the_first(capsys):
    axes = ["--axis", "model.heads=2,4", "--axis", "train.clip=None,1"]
    assert main(["sweep", "tiny", "--dry-run", "--seeds", "1", "--widths", "16", *axes, *FEW]) == 0
    said = capsys.readouterr().out
    assert "4 members to train" in said
    assert "model.heads" in said
    assert "train.clip" in said


def test_every_command_is_there_and_help_waits_for_none_of_them():
    assert all(callable(cli.load(command)) for command in cli.COMMANDS)
    code = "import sys; from cluster import cli; cli.main(['--help']); cli.main(['--version']); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "ray", "mlflow", "optuna", "matplotlib", "pandas"} & set(loaded)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (BrokenOffError("no node; the same command goes on"), "headway: no node; the same command goes on\n"),
        (StorageInternalError("a commit"), "headway: the study's database: a commit; the same command goes on later\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/x"),
            "headway: [Errno 28] No space left on device: '/x'; the same command goes on once that is mended\n",
        ),
    ],
)
def test_what_breaks_a_sweep_off_from_outside_is_one_line_and_code_1(monkeypatch, capsys, error, line):
    def break_off(*args):
        raise error

    monkeypatch.setattr(commands, "run_sweep", break_off)
    assert main(["sweep", "tiny"]) == 1
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("arguments", "goes_on"),
    [
        (["sweep", "tiny"], True), (["search", "tiny"], True), (["probe", "llc", "tiny"], True),
        (["probe", "calibrate", "tiny"], False), (["probe", "transfer", "tiny"], False), (["analyze", "tiny"], False),
    ],
)  # fmt: skip
def test_an_interrupted_command_says_that_it_goes_on_only_where_it_does(monkeypatch, capsys, arguments, goes_on):
    def interrupt(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load", lambda command: interrupt)
    assert main(arguments) == 130
    more = "; the ledger says what is done, the same command goes on from there" if goes_on else ""
    assert capsys.readouterr().err == f"headway: stopped{more}\n"


@pytest.mark.parametrize(("arguments", "goes_on"), [(["search", "tiny"], True), (["export", "tiny"], False)])
def test_a_full_disk_is_one_line_that_promises_only_what_is_so(monkeypatch, capsys, arguments, goes_on):
    def fill(*given):
        raise OSError(errno.ENOSPC, "No space left on device", "/x")

    monkeypatch.setattr(cli, "load", lambda command: fill)
    assert main(arguments) == 1
    more = "; the same command goes on once that is mended" if goes_on else ""
    assert capsys.readouterr().err == f"headway: [Errno 28] No space left on device: '/x'{more}\n"


def test_a_ledger_that_cannot_be_told_hides_no_cause(monkeypatch, capsys):
    """The server is away at the end too: why the sweep ended is what is raised; only a good end needs the ledger."""

    class Away(driver.tracking.Ledger):
        def __init__(self):
            self.untold = self.lost = False

        def settle(self, running_too):
            raise MlflowException("API request failed")

    monkeypatch.setattr(driver.tracking, "open_sweep", lambda *args: Away())
    monkeypatch.setattr(driver.ray, "shutdown", lambda: None)
    with pytest.raises(BrokenOffError, match="no server"), driver.held_ledger(SimpleNamespace(client=0, uri=""), None):
        raise BrokenOffError("no server")
    assert "the ledger cannot be told how this ended" in capsys.readouterr().err
    with pytest.raises(MlflowException), driver.held_ledger(SimpleNamespace(client=0, uri=""), None):
        pass
