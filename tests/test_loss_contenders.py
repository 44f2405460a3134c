"""What the benchmarks compare computes the same loss, and a missing peer is no error."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from dynloss_ext import Oscillation, dynamic_cross_entropy


@pytest.fixture
def benchmarks(benchmark_script):
    return benchmark_script("loss_contenders"), benchmark_script("compare_losses")


def stand_ins():
    """Modules with the signatures of the peers' losses."""

    def cross_entropy(x, target, weight=None, reduction="mean"):
        return F.cross_entropy(x, target, weight=weight, reduction=reduction)

    class SoftmaxCrossEntropyLoss:
        @staticmethod
        def apply(logits, labels, smoothing=0.0, padding_idx=0, half_to_float=False):
            losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
            return losses.masked_fill(labels == padding_idx, 0)

    return types.SimpleNamespace(
        liger_cross_entropy=cross_entropy, cross_entropy=cross_entropy, SoftmaxCrossEntropyLoss=SoftmaxCrossEntropyLoss
    )


def test_all_contenders_compute_the_same_loss(benchmarks):
    contenders, _ = benchmarks
    steps = contenders.Steps(contenders.Case(50, 7, torch.float32), "cpu")
    (logits,) = steps.logits
    for step in (0, 30, 123, 760):
        steps.step = step
        expected = dynamic_cross_entropy(
            logits, steps.target, Oscillation(7, contenders.AMPLITUDE, contenders.PERIOD), step
        )
        losses = [contenders._torch_loss, contenders._loss_for_compile]
        losses += [contenders._peer_loss(name, stand_ins()) for name in contenders.PEERS]
        for loss in losses:
            torch.testing.assert_close(loss(logits, steps.target, steps.eager_weights()), expected)


def test_a_peer_that_is_missing_or_fails_is_reported(benchmarks, monkeypatch):
    contenders, compare = benchmarks
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    case = contenders.Case(20, 8, torch.float32)
    monkeypatch.setattr(contenders, "PEERS", {"liger": contenders.PEERS["liger"]})
    assert contenders._peers(contenders.Steps(case, "cpu"))["liger"].startswith("not installed (ModuleNotFoundError")

    def refuse():
        raise AssertionError("Input N 3 is not divisible by vector size 4")

    runs = {"ours": contenders.contenders(case)["ours"], "quack": contenders.Contender(refuse), "apex": "not installed"}
    row = compare.time_case(runs, 0.0, "cpu")
    assert row["apex"] == "not installed" and row["quack"].startswith("failed (AssertionError: Input N 3")
    assert row["ours"] > 0
    with pytest.raises(AssertionError):
        compare.time_case({"ours": contenders.Contender(refuse)}, 0.0, "cpu")
