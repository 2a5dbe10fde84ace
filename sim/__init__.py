"""Interacting-particle systems: what is learnt."""
