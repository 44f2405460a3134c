"""The first stage of tools/gpu_check.py: a copy of the tree in WORK/tree with the extension in it.

The compiled module is the pack's where that fits these sources, this Python and this torch, else it is built here.
Packages of the pack that this machine lacks go to WORK/site. Writes what it did to --json; the copy must then be
importable.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from gpu_packing import copy_tree, misfit, unpack_site

MODULE = ("_C*.so", "_build_info.json")


def versions() -> dict[str, str]:
    torch = importlib.metadata.version("torch").split(".")
    return {"python": f"{sys.version_info.major}.{sys.version_info.minor}", "torch": ".".join(torch[:2])}


def copy_module(folder: Path, tree: Path) -> None:
    for pattern in MODULE:
        for path in folder.glob(pattern):
            shutil.copy(path, tree / "dynloss_ext" / path.name)


def remove_module(tree: Path) -> None:
    for pattern in MODULE:
        for path in (tree / "dynloss_ext").glob(pattern):
            path.unlink()


def installed_package() -> Path | None:
    """The folder of the dynloss_ext of this environment, if it has one."""
    spec = importlib.util.find_spec("dynloss_ext")
    return Path(spec.origin).parent if spec and spec.origin else None


def build(tree: Path) -> None:
    import torch

    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    jobs = str(os.cpu_count())
    environment = os.environ | {"DYNLOSS_EXT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": capability, "MAX_JOBS": jobs}
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tree, env=environment, check=True)


def loads(tree: Path, site: Path) -> bool:
    """Whether the copy imports; prints what it is."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (tree, site)))}
    return subprocess.run([sys.executable, "-m", "dynloss_ext"], cwd=tree, env=environment).returncode == 0


def load(work: Path, pack: Path | None, dry: bool) -> dict[str, object]:
    tree, site = work / "tree", work / "site"
    installed = installed_package() if dry else None  # before the copy, which comes first in the path
    copy_tree(tree)
    (work / "gpu_guard").unlink(missing_ok=True)
    if pack and misfit(pack, "gpu_guard", {}) is None:
        shutil.copy(pack / "gpu_guard", work / "gpu_guard")
        (work / "gpu_guard").chmod(0o755)  # some ways of carrying it lose that
    packages = unpack_site(pack, site) if pack else []
    why_not = misfit(pack, "module", versions()) if pack else "no pack"
    if pack and why_not is None:
        copy_module(pack / "module", tree)
        if loads(tree, site):
            return {"module": "from the pack", "packages": packages}
        remove_module(tree)
        why_not = "the pack's module does not load here"
    if dry:
        if installed is None:
            sys.exit(f"gpu_load: {why_not}, and dynloss_ext is not installed")
        copy_module(installed, tree)
    else:
        build(tree)
    if not loads(tree, site):
        sys.exit("gpu_load: the extension does not load")
    return {"module": f"{'of this environment' if dry else 'built here'}: {why_not}", "packages": packages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the copy")
    parser.add_argument("--pack", type=Path, help="folder made by tools/pack_for_gpu.py")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--dry", action="store_true", help="the module of this environment instead of a build")
    arguments = parser.parse_args()
    result = load(arguments.work, arguments.pack, arguments.dry)
    print(*(f"{name}: {value}" for name, value in result.items()), sep="\n")
    arguments.json.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
