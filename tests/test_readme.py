"""The README's Python runs as it stands there."""

import re
from pathlib import Path
from typing import Any

import torch

from dynloss_ext import HessianOperator

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_python_of_the_readme_runs(capsys) -> None:
    """One piece after the other, as a reader would."""
    namespace: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(code, "README.md", "exec"), namespace)
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if re.match(r"\d+00 |0 ", line)]) == 10
    assert namespace["tracker"].num_updates == 100
    assert namespace["layers"].keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    whole = HessianOperator(namespace["loss"], namespace["parameters"]).to_dense()
    assert torch.allclose(namespace["H"].to_dense(), whole, atol=1e-6)


def test_the_files_that_the_readme_names_exist() -> None:
    for name in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (Path(__file__).parent.parent / name).is_file(), name
