"""The one error a user can cause, and the sentence it is told in."""

from __future__ import annotations

from collections.abc import Iterable


class ZooError(ValueError):
    """Wrong use or broken input. The message is one line that says what is allowed; commands exit with status 2."""


def choose(what: str, name: object, allowed: Iterable[str]) -> str:
    """Return `name` if it is one of `allowed`, else raise a ZooError that lists what is."""
    options = sorted(allowed)
    if isinstance(name, str) and name in options:
        return name
    raise ZooError(f"unknown {what} {name!r}; allowed: {', '.join(options) or 'none here'}")
