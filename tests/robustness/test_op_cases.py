"""Three hundred calls of the loss with everything varied at once."""

from __future__ import annotations

import pytest
import torch
from robustness import op_cases


def test_any_call_equals_the_twin() -> None:
    op_cases.run(300)


def test_what_differs_is_seen() -> None:
    """The twin of another step is not taken for the same."""
    logits, target = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    options = {"reduction": "mean", "label_smoothing": 0.0, "ignore_index": -100, "normalization": "samples"}
    case = op_cases.OpCase(logits, target, op_cases.Oscillation(4, 9, 10), 3, options, logits)
    op_cases.check(case)
    with pytest.MonkeyPatch.context() as patch:
        wrong = op_cases.reference.gradient
        patch.setattr(op_cases.reference, "gradient", lambda z, y, o, s, **k: wrong(z, y, o, s + 1, **k))
        with pytest.raises(AssertionError):
            op_cases.check(case)
