"""The build backend: setuptools, which asks for a torch to build against only where find_torch sees none."""

from __future__ import annotations

from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from target_torch import TORCH_REQUIREMENT, find_torch

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def get_requires_for_build_sdist(config_settings: object = None) -> list[str]:
    return []  # setuptools would run setup.py to find out, which needs a torch for all but the sdist itself


def get_requires_for_build_wheel(config_settings: object = None) -> list[str]:
    return [] if find_torch() else [TORCH_REQUIREMENT]


get_requires_for_build_editable = get_requires_for_build_wheel
