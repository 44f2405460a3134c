"""
Attention: a transformer by a closure
=====================================

Torch's fast attention kernels, flash and memory-efficient, have no second derivative, and a loss that was computed with
them cannot be given one afterwards. Hand over a closure instead: it runs with attention by plain operators, inside the
measurement alone, and training keeps the fast kernels.
"""

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn import functional

from dynloss_ext import HessianOperator, eigsh, plot

torch.manual_seed(0)
torch.set_num_threads(1)
tokens, width, heads, context = 11, 32, 4, 12


class Block(nn.Module):
    """Causal self-attention and two linear layers, each after a LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


model = nn.ModuleDict({"embedding": nn.Embedding(tokens, width), "block0": Block(), "block1": Block()})
model["head"] = nn.Linear(width, tokens)
position = nn.Parameter(0.1 * torch.randn(context, width))


def loss_of() -> Tensor:
    x = model["block1"](model["block0"](model["embedding"](text[:, :-1]) + position))
    return functional.cross_entropy(model["head"](x).flatten(0, 1), text[:, 1:].flatten())


# %%
# The task is a made-up language in which every token is the sum of the two before it, modulo 11.

text = torch.randint(tokens, (64, context + 1))
for i in range(2, context + 1):
    text[:, i] = (text[:, i - 1] + text[:, i - 2]) % tokens
parameters = dict(model.named_parameters()) | {"position": position}
optimizer = torch.optim.Adam(parameters.values(), lr=3e-3)

# %%
# What happens without a closure, and with one:

try:
    HessianOperator(loss_of(), parameters.items()) @ torch.ones(sum(p.numel() for p in parameters.values()))
except RuntimeError as error:
    print(f"{type(error).__name__}: {error}")
print(eigsh(HessianOperator(loss_of, parameters.items()), k=2).values)

# %%
# After some training: the diagonal blocks of the Hessian, all from one recorded backward pass, beside the whole.

for _ in range(100):
    optimizer.zero_grad()
    loss = loss_of()
    loss.backward()
    optimizer.step()
groups: dict[str, list[nn.Parameter]] = {}
for name, p in parameters.items():
    groups.setdefault(".".join(name.split(".")[:2]).removesuffix(".weight").removesuffix(".bias"), []).append(p)
blocks = {name: eigsh(H, k=4).values for name, H in HessianOperator.layers(loss_of, groups).items()}
whole = eigsh(HessianOperator(loss_of, parameters.items()), k=4).values
print(f"loss {loss.item():.3f}; largest eigenvalue {whole[0]:.1f}; of the blocks:")
for name, values in blocks.items():
    print(f"{name:13} {values[0]:7.2f}")

plt.figure(plot.layer_spectra(blocks, whole=whole, title="Four largest eigenvalues of each block"))
plt.show()

# %%
# The first block carries most of the curvature. No block's eigenvalue can exceed the whole's (Cauchy's interlacing),
# and the gap between them is what couples layers. One should not read 2 / learning rate into these numbers: the
# optimizer is Adam, whose stability depends on the Hessian preconditioned by its second moments. After a step of
# ``optimizer`` that is ``H.preconditioned(preconditioner(optimizer, params))``, for ``eigsh`` or, every so many steps,
# for a tracker's ``update``, and its limit ``stability_limit(optimizer)`` (*Edge of stability*, among the concepts).
