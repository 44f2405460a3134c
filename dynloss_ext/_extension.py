"""Loads the compiled module `dynloss_ext._C`, after checking that it was built for the torch that runs."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class BuildInfo:
    """How the compiled module was built, as setup.py noted it."""

    torch: str
    cuda: str | None
    cuda_architectures: list[str]
    compiler: str
    flags: list[str]


def read_build_info(folder: Path) -> BuildInfo:
    """The note that setup.py left beside the compiled module.

    Raises:
        ImportError: There is none: `folder` is a source folder that hides the installed package.
    """
    try:
        return BuildInfo(**json.loads((folder / "_build_info.json").read_text()))
    except FileNotFoundError:
        raise ImportError(
            f"{folder} holds the sources of dynloss_ext, not a built package: run Python elsewhere to use an"
            " installed dynloss_ext, or build this one with `python setup.py build_ext --inplace`"
        ) from None


def check_torch(build: BuildInfo, torch_version: str, torch_cuda: str | None) -> None:
    """Refuses a torch that the compiled module does not fit, where loading it would meet an undefined symbol.

    Raises:
        ImportError: Another minor version of torch, or another major version of CUDA (or none) under a module
            with CUDA kernels.
    """
    built, found = (".".join(version.split(".")[:2]) for version in (build.torch, torch_version))
    if built != found:
        raise ImportError(
            f"dynloss_ext was built for torch {built}, found {found}: reinstall dynloss_ext with"
            f" `pip install --force-reinstall --no-deps .` in its source folder, or from a wheel for torch {found}"
        )
    if build.cuda is not None and (torch_cuda or "").split(".")[0] != build.cuda.split(".")[0]:
        raise ImportError(
            f"dynloss_ext was built for a torch with CUDA {build.cuda}, found torch {torch_version} with"
            f" {f'CUDA {torch_cuda}' if torch_cuda else 'no CUDA'}: reinstall dynloss_ext with"
            " `pip install --force-reinstall --no-deps .` in its source folder"
        )


BUILD_INFO = read_build_info(Path(__file__).parent)
check_torch(BUILD_INFO, torch.__version__, torch.version.cuda)
importlib.import_module("dynloss_ext._C")
