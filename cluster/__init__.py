"""Sweeps on a Ray cluster. Imports nothing, so that `python -m cluster.pack` runs on a machine with only torch."""
