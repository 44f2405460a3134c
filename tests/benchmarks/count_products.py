"""Counts the products that the driver and SciPy's ARPACK need on spectra that are hard for them, and what they miss.

    python tests/benchmarks/count_products.py --json tests/benchmarks/results/products.json

Diagonal matrices of 2,000 rows in float64, the largest k eigenvalues to a tolerance of 1e-3. Where eigenvalues repeat
or crowd, ARPACK ends earlier by missing copies: the error says so. Ours spends its products on audits, which look for
them. The counts depend on no clock, and on no machine but for rounding.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import write_json
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator
from scipy.sparse.linalg import eigsh as arpack

from dynloss_ext import ConvergenceWarning, eigsh

ROWS, TOL = 2000, 1e-3

Array = NDArray[np.float64]


def spectra() -> dict[str, tuple[Array, int]]:
    """Name -> eigenvalues and how many of them are asked for."""
    bulk = np.random.default_rng(0).uniform(0, 0.9, ROWS)
    steps = np.arange(ROWS)
    outliers = np.where(steps < 10, 100.0, np.where(steps < 20, 50.0, bulk))
    return {
        "20 equal on top of a bulk": (np.where(steps < 20, 1.0, bulk), 3),
        "20 within 2e-4": (np.where(steps < 20, 1 - 1e-5 * steps, bulk), 3),
        "20 within 2e-2": (np.where(steps < 20, 1 - 1e-3 * steps, bulk), 3),
        "100 within 1e-2": (np.where(steps < 100, 1 - 1e-4 * steps, bulk), 3),
        "evenly spaced": (np.linspace(0, 1, ROWS), 3),
        "fifth powers": (np.linspace(-1, 1, ROWS) ** 5, 3),
        "every one four times": (np.repeat(np.linspace(0, 1, ROWS // 4) ** 3, 4), 5),
        "two blocks of ten, 3 of the first": (outliers, 3),
        "two blocks of ten, all of the first": (outliers, 10),
    }


def count(values: Array, k: int) -> dict[str, Any]:
    """Products and worst error of each solver, relative to the largest eigenvalue, and what ours says of itself."""
    diagonal = torch.from_numpy(values)
    exact = np.sort(values)[::-1][:k]
    products = 0

    def multiply(v: Array) -> Array:
        nonlocal products
        products += 1
        return values * v.reshape(-1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        ours = eigsh(lambda v: diagonal * v, k, n=ROWS, dtype=torch.float64, tol=TOL, max_hvp=5000)
    row: dict[str, Any] = {
        "ours": (ours.num_hvp, float(np.abs(ours.values.numpy() - exact).max() / exact[0])),
        "status": ours.status,
        "miss_probability": ours.miss_probability,
    }
    for name, ncv in (("SciPy", None), ("SciPy ncv=24", 24)):
        products = 0
        operator = LinearOperator((ROWS, ROWS), matvec=multiply, dtype=np.float64)
        start = np.random.default_rng(1).standard_normal(ROWS)
        found = arpack(operator, k=k, which="LA", tol=TOL, ncv=ncv, v0=start, return_eigenvectors=False)
        row[name] = (products, float(np.abs(np.sort(found)[::-1] - exact).max() / exact[0]))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = {}
    print(f"{'products (worst error)':38}{'ours':>16}{'SciPy':>16}{'SciPy ncv=24':>16}  what ours says")
    for name, (values, k) in spectra().items():
        row = rows[name] = count(values, k)
        cells = "".join(f"{row[s][0]:6d} ({row[s][1]:.0e})" for s in ("ours", "SciPy", "SciPy ncv=24"))
        print(f"{name:38}{cells}  {row['status']}, {row['miss_probability']:.2f}", flush=True)
    if options.json:
        write_json(options.json, rows)


if __name__ == "__main__":
    main()
