"""Interacting-particle systems: what is learnt."""

from __future__ import annotations

from sim.active_matter import ActiveMatter
from sim.particles import ParticleSystem
from sim.system import System

SYSTEMS: dict[str, type[System]] = {"particles": ParticleSystem, "active_matter": ActiveMatter}
"""The systems by name: the one place that lists them."""


def system_name(system: System) -> str:
    """The name of a system's class in `SYSTEMS`, or where the class is defined if it is not listed."""
    kind = type(system)
    listed = [name for name, known in SYSTEMS.items() if known is kind]
    return listed[0] if listed else f"{kind.__module__}.{kind.__qualname__}"
