"""The walls of the house: who may import whom, and what runs on a bare machine."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SERVICE = {"ray", "mlflow", "optuna"}
HOUSE = {"sim", "train", "probes", "cluster", "tests"}
FLOORS = {"sim": set(), "probes": set(), "train": {"sim"}, "cluster": {"sim", "train", "probes"}}
BARE = {"torch", "numpy", "scipy"}
BARRED = SERVICE | {"pyarrow", "pandas", "tyro", "rich", "matplotlib", "jinja2"}


def imported(path):
    """Top-level names of all modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", FLOORS)
def test_every_floor_stands_on_those_below(package):
    for path in (ROOT / package).glob("*.py"):
        names = set(imported(path))
        assert not names & HOUSE - FLOORS[package] - {package}, path
        if package != "cluster":
            assert not names & SERVICE, path
            assert names <= BARE | FLOORS[package] | {package} | set(sys.stdlib_module_names), path


def test_a_pack_is_trained_with_torch_numpy_and_scipy_alone(tmp_path):
    """In a process where every other package is barred: two members trained, probed, and written as .npz."""
    script = f"""
import sys
class Bar:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BARRED}:
            raise ModuleNotFoundError(f"barred: {{name}}")
sys.meta_path.insert(0, Bar())
from cluster.pack import main
sys.exit(main(["tiny", "--out", {str(tmp_path)!r}, "--only", "1", "--size", "2", "--steps", "8", "--device", "cpu"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    import numpy as np

    folders = list((tmp_path / "members").iterdir())
    assert len(folders) == 2
    for folder in folders:
        with np.load(folder / "curves.npz", allow_pickle=False) as curves:
            assert set(curves["step"]) == set(range(9))
            assert set(curves["probe"]) == {"attention", "ablation", "distance"}
        with np.load(folder / "weights.npz", allow_pickle=False) as weights:
            assert {name.split("/")[0] for name in weights.files} >= {"0", "1", "8"}


def test_the_top_level_is_the_users():
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=False).stdout.split(
        "\n"
    )
    tops = {name.split("/")[0] for name in listed if name and not name.startswith(".")}
    assert tops <= {"pyproject.toml", "README.md", "LICENSE", "cluster", "sim", "train", "probes", "tests"}
