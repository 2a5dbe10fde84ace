"""Packs of small transformers, trained together."""
