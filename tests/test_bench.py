"""Benchmarks do not rot: every one of them can be imported, and its command line can be read."""

import importlib
import pkgutil
import sys

import pytest

import tests.bench

NAMES = sorted(module.name for module in pkgutil.iter_modules(tests.bench.__path__))
HELPERS = {"measure", "memory", "runs"}  # what benchmarks share


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_says_how_it_is_called(name, monkeypatch, capsys):
    module = importlib.import_module(f"tests.bench.{name}")
    assert module.__doc__
    assert hasattr(module, "main") == (name not in HELPERS)
    if hasattr(module, "main"):
        monkeypatch.setattr(sys, "argv", [f"tests/bench/{name}.py", "--help"])
        with pytest.raises(SystemExit) as ended:
            module.main()
        assert ended.value.code == 0
        said = capsys.readouterr().out
        assert f"python -m tests.bench.{name}" in said
        assert "--help" in said
