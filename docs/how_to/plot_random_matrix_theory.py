"""
A published spectrum beside the measured one
============================================

Pennington and Bahri (*Geometry of Neural Network Loss Surfaces via Random Matrix Theory*, ICML 2017) take the Hessian
of a squared error apart, into its Gauss-Newton part H₀ and the rest H₁, in which the residuals are factors. Where both
may be taken for random matrices, their densities solve cubic equations, and can be drawn beside what
``spectral_density`` measures: of such matrices, and then of a network.
"""

import math
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from numpy.typing import NDArray
from torch import nn

from dynloss_ext import GaussNewtonOperator, HessianOperator, SpectralDensity, plot, spectral_density, trace

Array = NDArray[np.float64]

# %%
# The theory has two parameters: φ, parameters per residual, and the energy ε, half the mean square of the residuals.
# As a Wishart matrix H₀ has the R-transform 1 / (1 - φG), as a Wigner matrix H₁ has 2εG, and their sum has the sum of
# both, if they are free of each other. Then R(G) + 1/G = z, cleared of fractions, is an equation for the Stieltjes
# transform G(z), complex where there are eigenvalues; for ε = 0 it is the law of Marchenko and Pastur. There are
# negative eigenvalues where ε exceeds a critical energy.


def density_of(*coefficients: Array | float) -> Array:
    """(n,) density, from the coefficients, (n,) each or constant, of a polynomial in G, highest power first."""
    rows = np.stack(np.broadcast_arrays(*coefficients), -1)
    return np.array([np.roots(row).imag.max() for row in rows]) / math.pi


def sum_law(x: Array, phi: float, epsilon: float) -> Array:
    """Density of a Wishart plus a Wigner matrix."""
    return density_of(2 * epsilon * phi, -2 * epsilon - phi * x, x + phi - 1, -1.0)


def product_law(x: Array, phi: float, epsilon: float) -> Array:
    """Density of H₁ for a network with one hidden layer of ReLU, whose R-transform is εφG / (2 - εφ²G²); φ < 1."""
    return density_of(epsilon * phi**2 * x, epsilon * phi * (1 - phi), -2 * x, 2.0)


def critical_energy(phi: float) -> float:
    return (1 - 20 * phi - 8 * phi**2 + (1 + 8 * phi) ** 1.5) / 16


# %%
# Random matrices of 1000 rows, at φ = 1/4. What is measured is broadened by a Gaussian, and so must be the theory.

torch.manual_seed(0)
torch.set_num_threads(1)
size, phi = 1000, 0.25
factor, noise = torch.randn(size, int(size / phi)).double(), torch.randn(size, size).double()
wishart, wigner = factor @ factor.T / factor.shape[1], (noise + noise.T) / math.sqrt(2 * size)


def broadened(density: Array, grid: Array, bandwidth: float) -> Array:
    kernel = np.exp(-0.5 * ((grid[:, None] - grid) / bandwidth) ** 2) / (bandwidth * math.sqrt(2 * math.pi))
    return kernel @ density * (grid[1] - grid[0])


def compare(axis: Axes, found: SpectralDensity, law: Callable[[Array], Array], colour: str, label: str) -> None:
    """The density with its standard error, and dotted the theory."""
    grid, measured, stderr = (t.numpy() for t in (found.grid, found.density, found.stderr))
    theory = broadened(law(grid), grid, found.bandwidth)
    axis.plot(grid, measured, color=colour, label=label)
    axis.fill_between(grid, measured - stderr, measured + stderr, color=colour, alpha=0.25, lw=0)
    axis.plot(grid, theory, color="black", ls=":", zorder=3)
    axis.set(xlabel=r"eigenvalue $\lambda$", ylabel=r"density $\rho(\lambda)$")
    axis.locator_params(axis="x", nbins=7)
    print(f"{label:24} differs from theory by up to {np.abs(measured - theory).max() / theory.max():5.1%} of its peak")


def model(epsilon: float, **options: Any) -> SpectralDensity:
    matrix = wishart + math.sqrt(2 * epsilon) * wigner
    return spectral_density(lambda v: matrix @ v, n=size, dtype=matrix.dtype, num_steps=60, **options)


plt.style.use(plot.STYLE)
figure, ((sums, indices), (rests, firsts)) = plt.subplots(2, 2, figsize=(7.2, 5.4), layout="constrained")
for epsilon, colour in zip((0.0, 0.1, 1.0), plot.EIGENVALUE_COLOURS[1:], strict=False):
    found = model(epsilon, num_probes=50, bandwidth=0.1)
    compare(sums, found, lambda x, e=epsilon: sum_law(x, phi, e), colour, f"ε = {epsilon:g}")
sums.plot([], [], color="black", ls=":", label="theory")
sums.set_title(f"Wishart + Wigner, {size} rows", loc="left")
sums.legend()

# %%
# The share of negative eigenvalues, the paper's index: the weights of the quadrature whose nodes are below 0. Next to
# the critical energy it grows with the power 3/2 of the distance.

critical = critical_energy(phi)
above, roots = np.geomspace(0.03, 30, 31), np.linspace(0, 3, 601)
share = [sum_law(-(roots**2), phi, critical * (1 + d)) @ roots * 2 * roots[1] for d in above]  # over λ = -root²
indices.loglog(above, share, color="black", ls=":", label="theory")
power = share[0] * (above[:16] / above[0]) ** 1.5
indices.loglog(above[:16], power, color="#bbbbbb", lw=2, zorder=1, label="power 3/2")
for distance in above[9::3]:
    found = model(critical * (1 + distance))
    below = torch.where(found.nodes < 0, found.weights, 0.0).sum(1)
    stderr = below.std() / math.sqrt(len(below))
    indices.errorbar(distance, below.mean(), stderr, fmt="o", ms=4, color=plot.EIGENVALUE_COLOURS[1])
indices.set_title("negative eigenvalues", loc="left")
indices.set(xlabel=r"distance $(\varepsilon - \varepsilon_c)\,/\,\varepsilon_c$", ylabel="share of all")
indices.legend()

# %%
# A network before training, with as many inputs and outputs as hidden units. H₁ has no entries but those between the
# two layers, blocks that are products of residuals and inputs. The theory takes residuals for independent noise, so the
# labels are made to miss the outputs by that.

units, phi, epsilon = 50, 0.5, 0.5
samples = int(2 * units / phi)
network = nn.Sequential(nn.Linear(units, units, bias=False), nn.ReLU(), nn.Linear(units, units, bias=False)).double()
for p in network.parameters():
    nn.init.normal_(p, std=units**-0.5)
inputs = torch.randn(samples, units).double()
labels = network(inputs).detach() + math.sqrt(2 * epsilon) * torch.randn(samples, units).double()
outputs = network(inputs)
loss = (outputs - labels).square().sum() / (2 * samples)
first = GaussNewtonOperator(loss, outputs, network.parameters())
rest = HessianOperator(loss, network.parameters()) - first

found = spectral_density(rest, num_probes=20, bandwidth=0.04)
compare(rests, found, lambda x: product_law(x, phi, epsilon), plot.EIGENVALUE_COLOURS[4], "H₁ of the network")
rests.set_title(f"$H_1$ of a network, {rest.shape[0]} parameters", loc="left")

# %%
# Its H₀, beside the law of Marchenko and Pastur with the same mean:

found, mean = spectral_density(first, num_probes=20, bandwidth=0.05), trace(first).value / first.shape[0]
compare(firsts, found, lambda x: sum_law(x / mean, phi, 0.0) / mean, plot.EIGENVALUE_COLOURS[4], "H₀ of the network")
firsts.set_title("$H_0$ of the network", loc="left")
beyond = torch.where(found.nodes > 5, found.weights, 0.0).sum(1) * first.shape[0]
print(f"{beyond.mean():.0f} ± {beyond.std() / math.sqrt(len(beyond)):.0f} of them beyond 5")
plt.show()

# %%
# What agrees: the densities of the matrices, to a few percent of their peaks, and the index over two decades; and H₁ of
# the network, although its blocks share their inputs and residuals.
#
# What one should not conclude: that a network's H₀ is a Wishart matrix. Its rows are products of inputs and of what
# comes back through the weights; most of its eigenvalues lie closer to 0 than the law has them, some farther away, and
# beyond 5 there is one for each output, since hidden units of ReLU have a positive mean. Nor that residuals stay
# independent of inputs: training is what ends that.
