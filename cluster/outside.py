"""Recipes, systems and probes of a user's own package, found by name: nothing is forked, nothing is registered.

A recipe is `module:function`, a probe `module:Class`, both as the user writes them; a system's class is stored as
`module.Class`. Importing a module runs its code. So names are imported only from where Python finds modules anyhow
(installed, on PYTHONPATH, or below the folder that the command was started in), never from a path or URL that a config
holds: who can write a ledger can pick among the user's modules, and bring no new code.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

from cluster.curves import KEYS
from probes import PROBES, Kind
from probes.probe import When
from sim.checks import require
from sim.system import System

PACKAGES = ("sim", "train", "probes", "cluster")
"""headway's own."""
METHODS = tuple(name for name in vars(System) if not name.startswith("_"))
"""What a system has."""


def find_module(name: str, where: str) -> ModuleType:
    """Import a module by its dotted name. ValueError in one line where there is none, or where it fails."""
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # last, as an installed command looks at its own folder in place of this one
    require(all(part.isidentifier() for part in name.split(".")), where, name, "the dotted name of a module")
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{name}.".startswith(f"{missing}."):
            reason = f"there is no module {missing!r} among those installed, on PYTHONPATH or in {here}"
        else:
            reason = f"it fails with {told(error)}"
        raise ValueError(f"{where}: {name!r} cannot be imported: {reason}") from error


def find_named(name: str, where: str) -> Any:
    """What `module:name` stands for. ValueError in one line."""
    module, colon, own = name.partition(":")
    require(bool(colon and module and own), where, name, "module:name, for example my.module:recipe")
    return take(find_module(module, where), own, where)


def take(module: ModuleType, name: str, where: str) -> Any:
    """A module's attribute, or ValueError that names what it has instead."""
    if not hasattr(module, name):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        raise ValueError(
            f"{where}: {module.__name__!r} has no {name!r}; it has {', '.join(own) or 'nothing of its own'}"
        )
    return getattr(module, name)


def told(error: BaseException) -> str:
    """An error in one line, with the place in the code that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    if isinstance(error, SyntaxError):
        place = f" ({Path(error.filename or '?').name}:{error.lineno})"
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}{place}" if text else f"{type(error).__name__}{place}"


def find_system(name: str, where: str) -> type[System]:
    """The class stored as `module.Class`. ValueError where it cannot be imported or is no system."""
    module, dot, own = name.rpartition(".")
    plain = bool(dot) and all(part.isidentifier() for part in name.split("."))
    require(plain, where, name, "module.Class, of a class at the top of its module")
    kind = take(find_module(module, where), own, where)
    require_system(kind, where)
    return kind  # type: ignore[no-any-return]


def require_system(kind: Any, where: str) -> None:
    """Raise ValueError unless the class is a frozen dataclass with all that `sim.system.System` asks for."""
    name = getattr(kind, "__qualname__", repr(kind))
    frozen = isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    require(frozen, where, name, "a frozen dataclass: @dataclass(frozen=True, kw_only=True)")
    fields = {item.name for item in dataclasses.fields(kind)}
    lacking = [method for method in METHODS if method not in fields and not hasattr(kind, method)]
    require(not lacking, where, name, f"a system (see sim.system.System); it lacks {', '.join(lacking)}")


def results_version(kind: Any) -> int | None:
    """What a system or probe says of its own code: a class attribute that is raised when a fix changes its numbers."""
    version = getattr(kind, "results_version", None)
    require(version is None or isinstance(version, int), f"{kind.__name__}.results_version", version, "a whole number")
    return version


def find_probe(name: str, where: str = "probe.probes") -> Any:
    """The class `module:Class` of a probe. ValueError where it cannot be imported or is no probe.

    Beside what `probes.probe.Probe` asks for, name, when and columns are told by the class itself, and it is made from
    the replicates of a probe set, by a class method `build` if it has one (which may return None: not for this set).
    """
    kind = find_named(name, where)
    require(isinstance(kind, type), where, name, "a class")
    own = f"{where}: {kind.__name__}"
    for item in ("name", "when", "columns", "measure"):
        require(hasattr(kind, item), where, name, f"a probe (see probes.probe.Probe); its class lacks {item}")
    named = isinstance(kind.name, str) and kind.name != "" and "/" not in kind.name
    require(named, f"{own}.name", kind.name, "a text without /, known from the class")
    require(kind.when in get_args(When), f"{own}.when", kind.when, "one of " + ", ".join(map(repr, get_args(When))))
    columns = kind.columns if isinstance(kind.columns, tuple) else ()
    sound = bool(columns) and all(isinstance(item, str) and item != "" and "/" not in item for item in columns)
    require(sound, f"{own}.columns", kind.columns, "a tuple of texts without /, known from the class")
    taken = [item for item in columns if item in KEYS]
    require(not taken, f"{own}.columns", taken, f"none of {', '.join(KEYS)}, which every table has")
    require(len(set(columns)) == len(columns), f"{own}.columns", columns, "without repeats")
    return kind


def probe_kinds(names: Sequence[str]) -> dict[str, Kind]:
    """All probes of a sweep, by name: those that every sweep has, then `names`, each `module:Class`. Or ValueError."""
    kinds = dict(PROBES)
    for each in names:
        kind = find_probe(each)
        require(kind.name not in kinds, f"probe.probes: {each}.name", kind.name, f"none of {', '.join(kinds)}")
        kinds[kind.name] = Kind(getattr(kind, "build", kind), kind.when)
    return kinds


def sources(modules: Iterable[str]) -> list[Path]:
    """Files and folders of the top-level packages of these modules, as far as they are not headway's or Python's own.

    What a job on another machine needs of them.
    """
    tops = sorted({name.partition(".")[0] for name in modules} - {*PACKAGES, *sys.stdlib_module_names})
    found = []
    for top in tops:
        spec = importlib.util.find_spec(top)
        folders = list(spec.submodule_search_locations or ()) if spec else []
        if folders or (spec and spec.origin):
            found.append(Path(folders[0] if folders else str(spec.origin)))  # type: ignore[union-attr]
    return found
