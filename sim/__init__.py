"""Interacting-particle systems: what is learnt."""

from __future__ import annotations

from sim.particles import ParticleSystem
from sim.system import System

SYSTEMS: dict[str, type[System]] = {"particles": ParticleSystem}
"""The systems by name: the one place that lists them."""
