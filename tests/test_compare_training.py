"""The comparison of training loops keeps what it has measured, whenever it is interrupted."""

from __future__ import annotations

import itertools
import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

ALL = ("exact", "tf32", "bfloat16")


@pytest.fixture
def compare_training(benchmark_script: Any) -> Any:
    return benchmark_script("compare_training")


def test_the_report_is_whole_after_every_turn(compare_training: Any, tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "new" / "report.json"
    turns: list[list[str]] = []  # what the report holds at each step

    def step() -> None:
        turns.append(list(json.loads(path.read_text())["images_per_second"]["wrn"]) if path.exists() else [])
        if len(turns) == 17:  # six steps of each to warm up, two rounds, and one step of a third
            raise KeyboardInterrupt

    def contenders(*arguments: Any) -> dict[str, Any]:
        return {name: compare_training.Contender(step, lambda: None, images=1) for name in ("plain", "ours")}

    monkeypatch.setattr(compare_training, "contenders", contenders)
    command = ["compare_training.py", "--device", "cpu", "--networks", "wrn", "--seconds", "0", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(KeyboardInterrupt):
        compare_training.main()
    assert turns[:12] == [[]] * 12
    assert turns[12:] == [[], ["plain"], ["plain", "ours"], ["plain", "ours"], ["plain", "ours"]]
    report = json.loads(path.read_text())
    assert report["images_per_second"]["wrn"]["ours"]["to_plain"] > 0
    assert report["sizes"] == "paper"
    assert [file.name for file in path.parent.iterdir()] == ["report.json"]


def test_every_contender_is_compared_with_a_plain_loop_of_its_numerics(compare_training: Any) -> None:
    """And that loop comes before it: its turn is over when a ratio is taken."""
    images = torch.zeros(128, 3, 32, 32, dtype=torch.uint8)
    split = compare_training.Split(images, torch.arange(128) % 10)
    data = compare_training.Dataset(split, split)
    for network, compiled in itertools.product(compare_training.NETWORKS, (False, True)):
        options = Namespace(small=True, device="cpu", members=2, compiled=compiled, numerics=ALL)
        built = compare_training.contenders(network, options, data)
        names = list(built)
        assert names[0] == "plain" and any("compiled" in name for name in names) == compiled
        for name, contender in built.items():
            if name.startswith("ours"):
                assert contender.like.removeprefix("plain, ") in name
                assert names.index(contender.like) < names.index(name)


def test_both_loops_of_the_same_numerics_set_the_same_switches(compare_training: Any) -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul

    def switches(name: str) -> tuple[bool, ...]:
        built[name].prepare()
        return matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark

    images = torch.zeros(128, 3, 32, 32, dtype=torch.uint8)
    split = compare_training.Split(images, torch.arange(128) % 10)
    options = Namespace(small=True, device="cpu", members=2, compiled=False, numerics=ALL)
    built = compare_training.contenders("wrn", options, compare_training.Dataset(split, split))
    try:
        for numerics, expected in (
            ("exact", (False, False, True, False)),
            ("bfloat16 channels_last", (False, False, False, True)),
        ):
            assert switches(f"plain, {numerics}") == switches(f"ours, {numerics}") == expected
        assert switches("plain") == compare_training.DEFAULTS
    finally:
        compare_training.set_defaults()
