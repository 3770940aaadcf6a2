"""What the tests of data sources ask of a source."""

from __future__ import annotations

from zoo.data.sources import Source


def by_split(source: Source) -> dict[str, list[bytes]]:
    """The documents of each split, their pieces joined."""
    texts: dict[str, list[bytes]] = {"train": [], "validation": [], "test": []}
    for piece in source:
        texts[piece.split] += [b""] if piece.begins else []
        texts[piece.split][-1] += piece.text
    return texts
