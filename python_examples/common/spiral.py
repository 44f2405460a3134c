"""The spiral classification task of the paper: its data set, its network, the network's initial values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common.run import load_arrays
from dynloss_ext import perceptron


def spiral_data(points: int = 100, classes: int = 3, noise: float = 0.2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Interleaved spiral arms: r = linspace(0, 1), θ = linspace(2πj/C, 2πj/C + 4π) + noise · N(0, 1).

    Returns:
        (classes · points, 2) float64 inputs (r cos θ, r sin θ) and their (classes · points,) int64 classes.
    """
    random = np.random.RandomState(seed)
    radius = np.linspace(0, 1, points)
    arms = []
    for label in range(classes):
        offset = 2 * np.pi * label / classes
        angle = np.linspace(offset, offset + 4 * np.pi, points) + noise * random.randn(points)
        arms.append(np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1))
    target = np.repeat(np.arange(classes), points)
    return torch.from_numpy(np.concatenate(arms)), torch.from_numpy(target)


class SpiralMLP(nn.Module):
    """One hidden ReLU layer: relu(x @ w1 + b1) @ w2 + b2.

    Weights are kept, and activations computed, with the samples last: (H, D) @ (D, N) and (C, H) @ (H, N). BLAS
    is poor at a right-hand side of three columns; this way a training step and a Hessian-vector product take two
    thirds of the time.
    """

    def __init__(self, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> None:
        """From w1 (D, H), b1 (H,), w2 (H, C), b2 (C,)."""
        super().__init__()
        self.w1, self.w2 = nn.Parameter(w1.t().contiguous()), nn.Parameter(w2.t().contiguous())
        self.b1, self.b2 = nn.Parameter(b1.unsqueeze(1).clone()), nn.Parameter(b2.unsqueeze(1).clone())

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.addmm(self.b1, self.w1, x.t()).relu_()
        return torch.addmm(self.b2, self.w2, hidden).t()

    @classmethod
    def initialised(cls, scheme: str, inputs: int, width: int, classes: int, seed: int) -> SpiralMLP:
        """A fresh float64 network with the values of `dynloss_ext.ensemble.perceptron_values`."""
        return cls(*perceptron.perceptron_values(scheme, inputs, width, classes, seed))


def load_initial_values(path: Path) -> tuple[Tensor, Tensor, SpiralMLP]:
    """Inputs, targets and network from an .npz with X (P, D), y (P,), w1 (D, H), b1 (H,), w2 (H, C), b2 (C,).

    Raises:
        ValueError: no such file, a missing array, shapes that do not fit, or a class that is not in [0, C).
    """
    if not path.is_file():
        raise ValueError(f"--init: expected {', '.join(perceptron.INITIALISATIONS)} or an .npz file, got {path}")
    names = ("X", "y", "w1", "b1", "w2", "b2")
    try:
        arrays = {name: array for name, array in load_arrays(path).items() if name in names}
    except Exception as error:  # a text; an .npy; half an archive; a header that promises more than there is
        raise ValueError(f"--init: expected an .npz file of plain arrays, got {path}") from error
    shapes = {name: array.shape for name, array in arrays.items()}
    if [len(shapes.get(name, ())) for name in names] != [2, 1, 2, 1, 2, 1]:
        expected = "X, w1, w2 with two dimensions and y, b1, b2 with one"
        raise ValueError(f"--init: expected {expected} in {path}, got shapes {shapes}")
    (points, inputs), (width, classes) = shapes["X"], shapes["w2"]
    for name, shape in {"y": (points,), "w1": (inputs, width), "b1": (width,), "b2": (classes,)}.items():
        if shapes[name] != shape:
            raise ValueError(f"--init: expected {name} of shape {shape} in {path}, got {shapes[name]}")
    if bad := [name for name in names if arrays[name].dtype.kind not in "fiu" or arrays[name].dtype.itemsize > 8]:
        raise ValueError(f"--init: expected numbers in {path}, got {bad[0]} of dtype {arrays[bad[0]].dtype}")
    target = arrays["y"]
    if target.size == 0:
        raise ValueError(f"--init: expected points in {path}, got none")
    if target.dtype.kind not in "iu" or target.min() < 0 or target.max() >= classes:
        got = f"{target.dtype} from {target.min()} to {target.max()}"
        raise ValueError(f"--init: expected y in {path} to hold integers 0 to {classes - 1}, got {got}")
    x, *values = (torch.from_numpy(arrays[name].astype(np.float64)) for name in names if name != "y")
    return x, torch.from_numpy(target.astype(np.int64)), SpiralMLP(*values)
