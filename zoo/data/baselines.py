"""What a text costs without a model, in bits per byte over exactly the bytes a model is measured on."""

from __future__ import annotations

import zlib

import numpy as np

from zoo.data.cache import TokenData
from zoo.errors import ZooError


def unigram_entropy(data: TokenData, split: str = "validation") -> float:
    """Entropy of the split's own byte frequencies, -sum p log2 p: the best any model does that ignores context."""
    counts = np.zeros(256, dtype=np.int64)
    for block in data.text(split):
        counts += np.bincount(np.frombuffer(block, dtype=np.uint8), minlength=256)
    share = counts[counts > 0] / _total(data, split)
    return float(-(share * np.log2(share)).sum())


def gzip_bits(data: TokenData, split: str = "validation") -> float:
    """Bits per byte of the split compressed as one file by gzip -9."""
    total = _total(data, split)
    packer = zlib.compressobj(9, zlib.DEFLATED, wbits=31)
    return 8 * (sum(len(packer.compress(block)) for block in data.text(split)) + len(packer.flush())) / total


def _total(data: TokenData, split: str) -> int:
    if not data.bytes[split]:
        raise ZooError(f"the corpus has no text in its {split} split")
    return data.bytes[split]
