"""What tests share beside the modules that they import; and processes that a test spawns find the test's own module."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

# Last in the path, behind an installed package: in front, the source folder dynloss_ext/ would hide it.
sys.path.append(str(Path(__file__).parent.parent))


@pytest.fixture
def benchmark_script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a script of tests/benchmarks, which is forgotten afterwards, as is what it imports from there."""
    folder = Path(__file__).parent / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module
    for name, module in list(sys.modules.items()):
        if folder == Path(getattr(module, "__file__", None) or "").parent:
            del sys.modules[name]


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For networks too small for more: threads that wait for each other crawl on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
