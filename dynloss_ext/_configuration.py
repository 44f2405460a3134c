"""Configurations as one tensor each, which any format of checkpoints can hold, and what tells two of them apart."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

Configuration = dict[str, Any]  # strings, numbers, None and float64 tensors by name

_LONGEST = 300  # characters of a difference


def pack(config: Configuration) -> Tensor:
    """(n,) uint8: a JSON object, in which a list is the shape of a tensor, a zero byte, and these tensors' float64.

    The object fills 1023 bytes at least: formats that load into tensors of the same size then take another's too.
    """
    shapes = {name: list(value.shape) if isinstance(value, Tensor) else value for name, value in config.items()}
    text = json.dumps(shapes).encode().ljust(1023)
    tensors = [value.numpy().tobytes() for value in config.values() if isinstance(value, Tensor)]
    return torch.frombuffer(bytearray(b"".join([text, b"\0", *tensors])), dtype=torch.uint8)


def unpack(state: object) -> Configuration:
    """What `pack` was given, or version 0.1.0 stored: a dict of lists with another of the oscillation inside.

    Raises:
        ValueError: it is neither.
    """
    try:
        if isinstance(state, dict):
            config = {**state, **state["oscillation"]}
            del config["oscillation"]
            return {name: _tensor_of(value) if isinstance(value, list) else value for name, value in config.items()}
        if not isinstance(state, Tensor) or state.dtype != torch.uint8:
            raise ValueError
        data = state.cpu().numpy().tobytes()
        start = data.index(0) + 1
        config = json.loads(data[: start - 1])
        for name, shape in config.items():
            if isinstance(shape, list):
                count = math.prod(shape)
                values = np.frombuffer(data, np.float64, count, start).reshape(shape)
                config[name] = _tensor_of(values)
                start += 8 * count
        return dict(config)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        got = state.dtype if isinstance(state, Tensor) else type(state).__name__
        raise ValueError(f"state_dict: expected the configuration of a loss, got another or a damaged {got}") from None


def _tensor_of(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def difference(own: Configuration, other: Configuration) -> str:
    """What another configuration has in place of one's own, in at most 300 characters; nothing if they agree.

    What a configuration does not name is None.
    """
    names = [name for name in {**own, **other} if not _equal(own.get(name), other.get(name))]
    text = "; ".join(_named(name, own.get(name), other.get(name)) for name in names)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and bool(a == b)


def _named(name: str, own: Any, other: Any) -> str:
    if isinstance(own, Tensor) and isinstance(other, Tensor) and own.shape == other.shape:
        first = np.unravel_index(int((own != other).view(torch.uint8).argmax()), own.shape)
        name, own, other = f"{name}{[int(i) for i in first]}", own[first].item(), other[first].item()
    return f"expected {name} = {_shown(own)}, got {_shown(other)}"


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return _shown(value.tolist()) if value.numel() <= 8 else f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
