"""Recipes, systems and probes from a user's own package: the README's example as it stands, and what is refused."""

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from cluster.cli import main
from cluster.encoding import decode, encode
from cluster.jobs import own_files, staged
from cluster.outside import PACKAGES, find_probe, sources
from cluster.pack import main as bare_main
from cluster.pack import probe_kinds
from cluster.recipes import load_sweep, tiny
from cluster.rehearsal import rehearse
from cluster.sweep import ProbeConfig, Sweep, canonical, validate

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "lab.recipes:neighbours"
QUICK = ["--steps", "30", "--size", "2"]


def write_lab(folder):
    """The README's own code blocks as files."""
    blocks = re.findall(r"```python\n# (lab/\w+\.py)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert {name for name, _ in blocks} == {"lab/recipes.py", "lab/nearest.py", "lab/sharpness.py"}
    for name, code in blocks:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A folder with the README's package in it, where the command is run; what it imports is forgotten after."""
    write_lab(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    known = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in set(sys.modules) - known:
        if name.partition(".")[0] in ("lab", "mine"):
            del sys.modules[name]


def write(folder, code, name="mine"):
    (folder / f"{name}.py").write_text(textwrap.dedent(code))


def test_the_readmes_example_is_trained_and_probed_without_ray(lab, capsys):
    assert bare_main([RECIPE, "--out", str(lab / "out"), *QUICK, "--device", "cpu", "--only", "0"]) == 0
    folders = list((lab / "out" / "members").iterdir())
    assert len(folders) == 2
    with np.load(folders[0] / "curves.npz", allow_pickle=False) as table:
        own = table["probe"] == "sharpness"
        assert set(table["probe"]) == {"attention", "ablation", "sharpness"}
        assert set(table["relation"][own]) == {"any"}
        assert np.isfinite(table["sharpness"][own]).all()
        assert (table["sharpness"][own] >= 1 / 6 - 1e-6).all()  # the largest of six weights
        assert np.isnan(table["sharpness"][~own]).all()
        assert set(table["step"][own]) == set(table["step"][table["probe"] == "attention"])
    with np.load(folders[0] / "figures.npz", allow_pickle=False) as figures:
        assert np.isfinite(figures["miss"]).any()


def test_a_sweep_of_ones_own_is_stored_by_name_and_read_again_in_another_process(lab):
    sweep = load_sweep(RECIPE)
    body = json.loads(json.dumps(encode(sweep)))
    assert body["system"] == {"type": "lab.nearest.Nearest", "n": 6, "relation": "nearest"}
    assert body["probe"]["probes"] == ["lab.sharpness:Sharpness"]
    (lab / "stored.json").write_text(json.dumps(body))
    assert load_sweep("stored.json") == sweep
    script = "import sys; from cluster.recipes import load_sweep as load; print(load(sys.argv[1]).id)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    (lab / "bin").mkdir()
    (lab / "bin" / "run.py").write_text(script)  # as of an installed command, whose own folder comes first
    command = [sys.executable, str(lab / "bin" / "run.py"), "stored.json"]
    done = subprocess.run(command, cwd=lab, env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == (sweep.id, "")


def test_where_a_stored_class_cannot_be_found_a_line_says_so(lab, monkeypatch, tmp_path_factory):
    body = encode(load_sweep(RECIPE))
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(lab))])
    for name in [name for name in sys.modules if name.partition(".")[0] == "lab"]:
        monkeypatch.delitem(sys.modules, name)
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match=r"sweep\.system: 'lab\.nearest' cannot be imported: there is no module"):
        decode(Sweep, body, "sweep")


def test_the_example_is_planned_from_the_command_line(lab, capsys):
    flags = ["--dry-run", "--seeds", "1", "--system.n", "5", "--axis", "system.n=5,7", "--workers", "1"]
    assert main(["sweep", RECIPE, *flags]) == 0
    said = capsys.readouterr().out
    assert "lab.nearest.Nearest; 2 layers x 2 heads" in said
    assert "4 members to train (0 done)" in said


def test_ids_leave_out_no_probes_and_know_those_there_are(lab):
    plain = tiny()
    assert "probes" not in canonical(plain.probe)
    own = dataclasses.replace(plain, probe=ProbeConfig(probes=("lab.sharpness:Sharpness",)))
    assert canonical(own.probe) == {"probes": ["lab.sharpness:Sharpness"]}
    assert {m.id for m in plain.members()}.isdisjoint(m.id for m in own.members())
    assert own.id != plain.id


def test_a_raised_results_version_makes_other_members(lab):
    from cluster.sweep import _canonical_part

    sweep = load_sweep(RECIPE)
    before = sweep.members()[0].id
    for kind, name in ((type(sweep.system), "system"), (find_probe(sweep.probe.probes[0]), "probe")):
        kind.results_version = 2
        _canonical_part.cache_clear()
        assert canonical(getattr(sweep, name))["results_version"] == [2]
        raised = sweep.members()[0].id
        assert raised != before
        before = raised
    find_probe(sweep.probe.probes[0]).results_version = "two"
    _canonical_part.cache_clear()
    with pytest.raises(ValueError, match=r"Sharpness\.results_version: 'two' is not allowed"):
        sweep.members()


WRONG_RECIPES = [
    ("mine", "def f(): ...", "recipe: 'mine' is unknown; it must be one of quick, width, tiny, "),
    ("mine:", "def f(): ...", "recipe: 'mine:' is not allowed; it must be module:name"),
    ("nowhere.x:f", "", "recipe: 'nowhere.x' cannot be imported: there is no module 'nowhere' among those installed"),
    ("mine.x:f", "", "recipe: 'mine.x' cannot be imported: there is no module 'mine.x' among"),
    ("../mine:f", "", "recipe: '../mine' is not allowed; it must be the dotted name of a module"),
    ("mine:g", "def f(): ...", "recipe: 'mine' has no 'g'; it has f"),
    (
        "mine:f",
        "f = 3",
        "recipe: 'mine:f' is not allowed; it must be a function without arguments",
    ),
    ("mine:f", "def f(): return {}", "recipe: 'mine:f' is not allowed; .* returns a Sweep \\(it returns dict\\)"),
    ("mine:f", "def f(x): return x", "recipe: 'mine:f' fails with TypeError: f\\(\\) missing 1 required"),
    ("mine:f", "def f():\n    return 1 / 0", "'mine:f' fails with ZeroDivisionError: division by zero \\(mine.py:2\\)"),
    ("mine:f", "import nothing_at_all", "'mine' cannot be imported: it fails with ModuleNotFoundError: .*mine.py:1"),
    ("mine:f", "def f(:", "'mine' cannot be imported: it fails with SyntaxError: .* \\(mine.py:1\\)"),
    ("mine:f", "raise SystemExit(3)", "'mine' cannot be imported: it fails with SystemExit: 3 \\(mine.py:1\\)"),
]


@pytest.mark.parametrize(("source", "code", "message"), WRONG_RECIPES)
def test_a_recipe_that_is_none_is_one_clear_line(lab, capsys, source, code, message):
    write(lab, code)
    assert main(["sweep", source]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.startswith("headway: ")
    assert error.count("\n") == 1
    assert not (lab / "mlflow.db").exists()


SYSTEM = """
from dataclasses import dataclass, field
from cluster.sweep import Sweep
from lab.nearest import Nearest
{body}
def f():
    return Sweep(name="mine", system={call})
"""
WRONG_SYSTEMS = [
    ("class S: ...", "S()", "recipe mine:f: system: 'S' is not allowed; it must be a frozen dataclass"),
    ("@dataclass\nclass S: ...", "S()", "system: 'S' is not allowed; it must be a frozen dataclass"),
    (
        "@dataclass(frozen=True)\nclass S:\n    relation: str\n    def rows(self, part, n, generator): ...",
        "S('x')",
        "system: 'S' is not allowed; it must be a system .*; it lacks d_in, d_out, statistics, draw, relations",
    ),
    (
        "@dataclass(frozen=True)\nclass S(Nearest):\n    more: dict = field(default_factory=dict)",
        "S()",
        "system: its fields must be numbers, texts, tuples \\(unhashable type: 'dict'\\)",
    ),
    (
        "def make():\n    @dataclass(frozen=True)\n    class S(Nearest): ...\n    return S()",
        "make()",
        "sweep.system: 'mine.make.<locals>.S' is not allowed; it must be module.Class, of a class at the top",
    ),
    (
        "@dataclass(frozen=True)\nclass S(Nearest):\n    more: complex = 1j",
        "S()",
        "recipe mine:f: system: its fields must be numbers, texts, tuples .*complex",
    ),
]


@pytest.mark.parametrize(("body", "call", "message"), WRONG_SYSTEMS, ids=[text[-40:] for *_, text in WRONG_SYSTEMS])
def test_a_system_that_could_not_be_read_again_is_refused(lab, body, call, message):
    write(lab, SYSTEM.format(body=body, call=call))
    with pytest.raises(ValueError, match=message) as caught:
        load_sweep("mine:f")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ("lab.nearest.Farthest", "sweep.system: 'lab.nearest' has no 'Farthest'; it has Nearest"),
        ("os.path.join", "sweep.system: 'join' is not allowed; it must be a frozen dataclass"),
        ("no.such.Thing", "sweep.system: 'no.such' cannot be imported: there is no module 'no' among those installed"),
    ],
)
def test_a_stored_system_is_imported_as_a_system_only(lab, stored, message):
    body = encode(load_sweep(RECIPE))
    body["system"]["type"] = stored
    with pytest.raises(ValueError, match=message) as caught:
        decode(Sweep, body, "sweep")
    assert "\n" not in str(caught.value)


PROBE = """
from lab.sharpness import Sharpness
class P(Sharpness):
    name = "p"
    {body}
"""
WRONG_PROBES = [
    ("name = 'attention'", "probe.probes: mine:P.name: 'attention' is not allowed; it must be none of attention, abl"),
    ("name = 'a/b'", "probe.probes: P.name: 'a/b' is not allowed; it must be a text without /"),
    ("when = 'often'", "probe.probes: P.when: 'often' is not allowed; it must be one of 'every', 'sparse'"),
    ("columns = ('layer', 'x')", r"probe.probes: P.columns: \['layer'\] is not allowed; it must be none of step, wall"),
    ("columns = 'x'", "probe.probes: P.columns: 'x' is not allowed; it must be a tuple of texts"),
    (
        "columns = ('x', 'y')",
        r"mine:P fails with ValueError: zip\(\) argument 2 is shorter .*attention.py",
    ),
    (
        "relations = ('a', 'b')",
        r"mine:P: sharpness: \(1, 2, 2, 1, 8\) is not allowed; .* = \(1, 2, 2, 2",
    ),
    ("def measure(self, view): return None", "probe.probes: mine:P fails with AttributeError: 'NoneType' object"),
    (
        "def measure(self, view): return view.attend(0)",
        "mine:P fails with AttributeError: 'Snapshot' .*mine.py:5",
    ),
    ("def __init__(self, x): raise OSError('no')", "probe.probes: one of them fails with OSError: no .*mine.py:5"),
]


@pytest.mark.parametrize(("body", "message"), WRONG_PROBES, ids=[body[:30] for body, _ in WRONG_PROBES])
def test_a_probe_that_could_not_work_is_refused_before_anything_starts(lab, body, message):
    write(lab, PROBE.format(body=body))
    sweep = load_sweep(RECIPE)
    sweep = dataclasses.replace(sweep, probe=dataclasses.replace(sweep.probe, probes=("mine:P",)))
    with pytest.raises(ValueError, match=message) as caught:
        rehearse(validate(sweep))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("d_out = 3", r"system: S: .*targets: \(4, 6, 2\) is not allowed; it must be \[4, 6, d_out\] with d_out = 3"),
        ("relation: str = 'farthest'", "system: S.*'farthest'"),
        ("def loss(self, p, batch): return p.sum()", r"S: loss: \(\) is not allowed; it must be \[4\], one number"),
        ("def draw(self, rows, generator): return rows.columns['y']", "system: S fails with KeyError: 'y' .*mine.py:"),
        ("def diagnose(self, *all): return {'miss': all[1].columns['x'][:2]}", r"system: S: diagnose\['miss'\]: "),
    ],
)  # fmt: skip
def test_a_system_that_could_not_work_is_refused_before_anything_starts(lab, body, message):
    write(lab, SYSTEM.format(body=f"@dataclass(frozen=True)\nclass S(Nearest):\n    {body}", call="S(n=6)"))
    sweep = load_sweep("mine:f")
    with pytest.raises(ValueError, match=message) as caught:
        rehearse(validate(dataclasses.replace(sweep, probe=ProbeConfig(examples=8))))
    assert "\n" not in str(caught.value)


def test_a_rehearsal_of_what_is_known_is_none_and_leaves_no_trace(lab, monkeypatch):
    sweep = load_sweep(RECIPE)
    rehearse(validate(sweep))
    assert sorted(path.name for path in lab.iterdir() if path.name != "lab") == []
    monkeypatch.setattr("cluster.rehearsal.make_pool", lambda config: pytest.fail("a known system was rehearsed"))
    rehearse(validate(tiny()))


def test_further_probes_stand_behind_the_known_ones(lab):
    assert list(probe_kinds(("lab.sharpness:Sharpness",))) == ["attention", "ablation", "distance", "sharpness"]
    with pytest.raises(ValueError, match="none of attention, ablation, distance, sharpness"):
        probe_kinds(("lab.sharpness:Sharpness",) * 2)


def test_a_job_is_sent_the_packages_of_recipe_system_and_probes(lab):
    sweep = load_sweep(RECIPE)
    assert own_files(RECIPE, sweep, ()) == [lab / "lab"]
    assert own_files(RECIPE, sweep, (Path("lab"),)) == [Path("lab")]
    assert own_files("tiny", tiny(), ()) == []
    with staged(own_files(RECIPE, sweep, ()), installed=True) as folder:
        sent = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert sent == ["lab/nearest.py", "lab/recipes.py", "lab/sharpness.py"]
    write(lab, "", "alone")
    assert sources(["alone.x", "json", *PACKAGES]) == [lab / "alone.py"]
