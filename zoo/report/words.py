"""Figures in words, the same all through a report."""

from __future__ import annotations

from zoo.report.ranking import Spread


def bits(value: float) -> str:
    return f"{value:.4f}"


def spread(values: Spread) -> str:
    """The mean; with several seeds, also the least and the greatest."""
    if values.count == 1:
        return bits(values.mean)
    return f"{bits(values.mean)} ({bits(values.low)} to {bits(values.high)})"


def memory(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}" if size < 999.5 else f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.3g} GiB"


def large(value: float) -> str:
    """Three digits and a unit: 6.9P for 6.9e15."""
    for unit in ("", "k", "M", "G", "T", "P", "E", "Z"):
        if value < 999.5 or unit == "Z":
            break
        value /= 1000
    return f"{value:.3g}{unit}"


def context_of(tokens: float) -> str:
    """512, 1k, 2.9k: a k is 1024 tokens."""
    return f"{tokens / 1024:.3g}k" if tokens >= 1024 else f"{tokens:.3g}"


def quoted(text: str) -> str:
    """As code; a ` in it would end that."""
    return "`" + text.replace("`", "'") + "`"
