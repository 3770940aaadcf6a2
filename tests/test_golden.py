"""The losses of a short seeded training, pinned: a change of initialisation, mathematics or groups shows here.

`python tests/test_golden.py` writes golden.json anew; do it only for a change that means to move them, and say so.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cases import Case, listed, tiny, train_on

GOLDEN = Path(__file__).parent / "golden.json"
TEXT = (b"It is a truth universally acknowledged, that a single man in possession of a good fortune, "
        b"must be in want of a wife. ")


def short_run(case: Case) -> list[float]:
    """Losses before steps 0, 10 and 20 of AdamW on one sentence repeated."""
    torch.manual_seed(0)
    tokens = torch.tensor(list(TEXT * 8)[: 4 * 161]).view(4, 161)
    losses = list(train_on(tiny(case, vocab_size=256, dim=64, channel_dim=96), tokens, 21, lr=3e-3, weight_decay=0.1))
    return [round(losses[i], 4) for i in (0, 10, 20)]


@pytest.mark.parametrize("case", listed(), ids=str)
def test_golden_losses(case: Case) -> None:
    golden = json.loads(GOLDEN.read_text())
    assert str(case) in golden, f"no golden losses of {case}: run python tests/test_golden.py"
    # Other processors sum in other orders; twenty steps amplify that to a few thousandths.
    assert short_run(case) == pytest.approx(golden[str(case)], abs=0.02)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({str(case): short_run(case) for case in listed()}, indent=2) + "\n")
