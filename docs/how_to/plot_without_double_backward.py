"""
Without double backward: fused attention, compiled code
=======================================================

A closure lets `HessianOperator` run attention by plain operators and compiled modules uncompiled. Where that is not
wanted, since the context is too long for plain attention or the fast code is what one asks about, or where it does not
help, as with a kernel of one's own, ``HessianOperator.from_gradients`` takes differences of first derivatives. Such
products are inexact, and the operator says by how much.
"""

import copy
import warnings
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn import functional

from dynloss_ext import HessianOperator, eigsh, plot

warnings.filterwarnings("ignore", message=r"eigsh stopped by noise floor")  # shown below by the status
torch.manual_seed(0)
torch.set_num_threads(1)
tokens, width, context = 11, 32, 12


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(tokens, width), nn.Linear(width, tokens)
        self.position = nn.Parameter(0.1 * torch.randn(context, width))
        self.block = nn.TransformerEncoderLayer(width, 4, 64, 0.0, "gelu", batch_first=True, norm_first=True)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embedding(x) + self.position, self.mask, is_causal=True))


def loss_of(model: nn.Module) -> Tensor:
    return functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


# %%
# A made-up language, in which every token is the sum of the two before it, modulo 11, and some training.

text = torch.randint(tokens, (16, context + 1))
for i in range(2, context + 1):
    text[:, i] = (text[:, i - 1] + text[:, i - 2]) % tokens
model = Transformer()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(100):
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()

# %%
# Of a loss that fused attention has computed there is no second derivative:

try:
    HessianOperator(loss_of(model), model.named_parameters()) @ torch.ones(sum(p.numel() for p in model.parameters()))
except RuntimeError as error:
    print(f"{type(error).__name__}: {error}")

# %%
# By differences of gradients there is. The search for the best ``step``, the length by which parameters are displaced,
# is part of making the operator. ``noise`` is the error of a product with a unit vector; ``eigsh`` adds it to the
# residuals, within which the eigenvalues lie. Here it is far below the tolerance, 1e-3 of the eigenvalue.

H = HessianOperator.from_gradients(lambda: loss_of(model), model.named_parameters())
result = eigsh(H, k=1)
print(f"step {H.step:.1e}, noise {H.noise:.1e}")
print(f"λ₁ = {result.values[0]:.4f} ± {result.residuals[0]:.4f}, {result.status}, {result.num_hvp} products")

# %%
# Not so in bfloat16 autocast: the products' noise does not let the residual fall below the tolerance. The status is
# "noise floor", with a ConvergenceWarning, and further products would not help.


def autocast_loss() -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return loss_of(model)


noisy = HessianOperator.from_gradients(autocast_loss, model.named_parameters())
result = eigsh(noisy, k=1)
print(f"step {noisy.step:.1e}, noise {noisy.noise:.1e}")
print(f"λ₁ = {result.values[0]:.4f} ± {result.residuals[0]:.4f}, {result.status}, {result.num_hvp} products")

# %%
# What to do then: evaluate the loss outside of autocast, as above, or in float64 on a copy of the model, which goes
# through the same code; or live with the noise, by a ``tol`` above it. A step of one's own does not help, as the
# picture shows. ``order=2`` halves the price of a product; where gradients are smooth its error is larger.

double = copy.deepcopy(model).double()
exact = HessianOperator(lambda: loss_of(double), double.named_parameters())  # plain attention: the truth
largest = eigsh(exact, k=1)
v, scale = largest.vectors[:, 0], largest.values[0]
product = exact @ v
closures = {"bfloat16 autocast": (autocast_loss, model), "float32": (lambda: loss_of(model), model)}
closures["float64"] = (lambda: loss_of(double), double)


def by_hand(closure: Callable[[], Tensor], network: nn.Module, step: float) -> float:
    """The error of (4 D(δ) - D(2δ)) / 3, where D(δ) is the central difference of gradients at ± δ v."""
    params = list(network.parameters())
    origin, direction = nn.utils.parameters_to_vector(params).detach(), v.to(params[0].dtype)

    def gradient(displacement: float) -> Tensor:
        nn.utils.vector_to_parameters(origin + displacement * direction, params)
        return nn.utils.parameters_to_vector(torch.autograd.grad(closure(), params))

    near, far = ((gradient(d) - gradient(-d)) / (2 * d) for d in (step, 2 * step))
    nn.utils.vector_to_parameters(origin, params)
    return float(((4 * near - far) / 3 - product).norm() / scale)


plt.style.use(plot.STYLE)
figure, axis = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
for colour, (name, problem) in zip(plot.EIGENVALUE_COLOURS, closures.items(), strict=False):
    steps = torch.logspace(-6, 0, 10).tolist()
    axis.loglog(steps, [by_hand(*problem, step) for step in steps], color=colour, label=name)
    D = HessianOperator.from_gradients(problem[0], problem[1].named_parameters())
    error = float((D @ v.to(D.dtype) - product).norm() / scale)
    axis.plot(D.step, error, "o", color=colour, label="the step that is found" if D.dtype == v.dtype else None)
    axis.axhline(D.noise / scale, color=colour, ls=":", label="its noise" if D.dtype == v.dtype else None)
    print(f"{name:17} step {D.step:.1e}, noise {D.noise / scale:.1e}, error {error:.1e}, relative to λ₁")
axis.axhline(1e-3, color="#bbbbbb", lw=0.8, label="tolerance of eigsh")
axis.set(xlabel="step δ", ylabel=r"error of $H v_1$, relative to $\lambda_1$", ylim=(1e-13, 1e3))
figure.legend(loc="outside right upper")
plt.show()

# %%
# Short steps err by the noise of the gradients, long ones by the bend of the loss, and the step that is found is near
# the best of each precision. Over a training, give the next operator this one's ``step`` to begin with: 13 gradients
# instead of 20 to 60. How the noise is measured, and how far it can be trusted, is said under *Hessians by differences
# of gradients*.
