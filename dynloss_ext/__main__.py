"""`python -m dynloss_ext`, or `dynloss-ext`: what is installed, how it was built, and which kernels run here."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import numpy as np
import torch

import dynloss_ext
from dynloss_ext import _C
from dynloss_ext._extension import BUILD_INFO

_KEYS = ("CPU", "CUDA", "Meta", "Autograd", "FuncTorchBatched")


def report() -> str:
    """The lines that `python -m dynloss_ext` prints."""
    build = BUILD_INFO
    cuda = f"CUDA {build.cuda} for {', '.join(build.cuda_architectures)}" if build.cuda else "without CUDA"
    lines = [
        f"dynloss_ext {dynloss_ext.__version__} in {Path(dynloss_ext.__file__).parent}",
        f"running   Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}",
        f"built     for torch {build.torch}, {cuda}",
        f"          with {build.compiler}, {' '.join(build.flags)}",
        f"device    cpu: {_C.cpu_instruction_set()} kernels active, {torch.get_num_threads()} threads",
    ]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        use = "kernels active" if build.cuda else "no kernels: dynloss_ext was built without CUDA"
        capability = f"{device.major}.{device.minor}"
        lines.append(f"device    cuda:{index}: {device.name}, compute capability {capability}, {use}")
    if torch.cuda.device_count() == 0:
        lines.append("device    cuda: none" + (", kernels are compiled but idle" if build.cuda else ""))
    for name in sorted(torch._C._dispatch_get_all_op_names()):
        if name.startswith("dynloss::"):
            keys = [key for key in _KEYS if torch._C._dispatch_has_kernel_for_dispatch_key(name, key)]
            lines.append(f"op        {name}: {', '.join(keys) or 'composite'}")
    return "\n".join(lines)


def main() -> None:
    argparse.ArgumentParser(prog="dynloss-ext", description="Prints " + (__doc__ or "").partition(": ")[2]).parse_args()
    print(report())


if __name__ == "__main__":
    main()
