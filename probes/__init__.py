"""Measurements of heads: scores, ablations, and when and how they emerged."""
