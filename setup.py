"""Builds the compiled extension `dynloss_ext._C` against the torch that is installed."""

from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
SOURCES = sorted(
    str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.cpp") if path.parent.name != "cuda"
)

setup(
    ext_modules=[
        CppExtension(
            "dynloss_ext._C",
            SOURCES,
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args={
                "cxx": ["-O3", "-std=c++20", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra"]
            },
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
