"""Words that refusals share."""

from collections.abc import Iterable


def counted(n: int, noun: str) -> str:
    """`1 width`, `2 widths`."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def named(noun: str, values: Iterable[float]) -> str:
    """`width 16`, `widths 16 and 32`, `widths 16, 32 and 64`."""
    *most, last = (f"{value:g}" for value in values)
    return f"{noun}s {', '.join(most)} and {last}" if most else f"{noun} {last}"
