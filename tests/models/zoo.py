"""Small models of every kind that people bring: in float64, with few enough parameters for a dense Hessian."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint


def cross_entropy(outputs: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(outputs.reshape(-1, outputs.shape[-1]), target.reshape(-1))


@dataclass
class Case:
    """A model with its data, and how its curvature is asked for."""

    model: nn.Module
    inputs: Tensor
    target: Tensor
    criterion: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    tolerance: float = 1e-6  # relative to the largest eigenvalue
    dtype: torch.dtype = torch.float64  # of parameters and inputs
    step: float = 1e-5  # of the differences in the reference
    as_tensor: bool = False  # the loss is given as a tensor, not as a closure
    batches: bool = False  # ... as a closure of batches of two samples
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    seed: int | None = None  # of the random numbers that it draws, in the reference
    forward: Callable[[Tensor], Tensor] | None = None
    plain: Callable[[nn.Module], nn.Module] = lambda model: model  # what the model is for the reference
    refusals: dict[str, str] = field(default_factory=dict)  # by product, or "all": a part of the error

    def outputs(self, rows: slice | Tensor = slice(None)) -> Tensor:
        with self.context():
            return (self.forward or self.model)(self.inputs[rows])

    def loss(self) -> Tensor:
        with self.context():
            return self.criterion(self.outputs(), self.target)


CASES: dict[str, Callable[[], Case]] = {}


def case(name: str) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    def add(make: Callable[[], Case]) -> Callable[[], Case]:
        CASES[name] = make
        return make

    return add


def vectors(model: nn.Module, **options: Any) -> Case:
    """5 samples of 3 numbers in 3 classes."""
    return Case(model, torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1]), **options)


def images(model: nn.Module, **options: Any) -> Case:
    """4 images of 8 × 8 in 3 classes."""
    return Case(model, torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0]), **options)


def sequences(model: nn.Module, **options: Any) -> Case:
    """3 sequences of 5 vectors of 4 numbers in 3 classes."""
    return Case(model, torch.randn(3, 5, 4), torch.tensor([0, 1, 2]), **options)


def tokens(model: nn.Module, **options: Any) -> Case:
    """3 sequences of 5 tokens of 7, and the token after each."""
    return Case(model, torch.randint(7, (3, 5)), torch.randint(7, (3, 5)), **options)


def perceptron(activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 6), activation, nn.Linear(6, 3))


def refused(text: str) -> dict[str, str]:
    return {"all": text}


COUPLED = "expected one that treats each sample by itself"
WRONG_TWICE = dict.fromkeys(("Hessian", "tracker", "density"), "not symmetric")  # by torch

for activation in (nn.Tanh, nn.GELU, nn.SiLU, nn.ReLU, nn.Softplus, nn.PReLU):
    CASES[f"MLP, {activation.__name__}"] = partial(lambda a: vectors(perceptron(a())), activation)


@case("MLP in batches")
def _() -> Case:
    return vectors(perceptron(nn.Tanh()), batches=True)


@case("MLP, squared error")
def _() -> Case:
    def squared(outputs: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(outputs, F.one_hot(target, 3).to(outputs))

    return vectors(perceptron(nn.Tanh()), criterion=squared)


@case("SIREN")
def _() -> Case:
    class Sine(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(3 * x)

    return vectors(perceptron(Sine()))


@case("convolutions, max pooling")
def _() -> Case:
    return images(nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 3)))


@case("convolutions, channels last")
def _() -> Case:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(27, 3))
    return images(model.to(memory_format=torch.channels_last))


class Residual(nn.Module):
    """A basic block of ResNet."""

    def __init__(self, channels: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList([norm(channels), norm(channels)])

    def forward(self, x: Tensor) -> Tensor:
        inner = F.silu(self.norms[0](self.first(x)))
        return F.silu(x + self.norms[1](self.second(inner)))


def resnet(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), Residual(4, norm), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


@case("ResNet, BatchNorm in eval mode")
def _() -> Case:
    return images(resnet(nn.BatchNorm2d).eval())


@case("ResNet, BatchNorm in train mode")
def _() -> Case:
    return images(resnet(nn.BatchNorm2d), refusals={"NTK": COUPLED})


@case("ResNet, BatchNorm in train mode, in batches")
def _() -> Case:
    text = "got BatchNorm in train mode on 2 batches"
    return images(resnet(nn.BatchNorm2d), batches=True, refusals={"all": text, "by differences": text, "NTK": COUPLED})


@case("ResNet, GroupNorm")
def _() -> Case:
    return images(resnet(partial(nn.GroupNorm, 2)))


@case("ResNet, InstanceNorm")
def _() -> Case:
    return images(resnet(partial(nn.InstanceNorm2d, affine=True)))


@case("ConvNeXt block")
def _() -> Case:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
            self.norm, self.widen, self.narrow = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4)
            self.scale = nn.Parameter(torch.full((4,), 0.5))

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
            return x + (self.scale * self.narrow(F.gelu(self.widen(y)))).permute(0, 3, 1, 2)

    return images(
        nn.Sequential(nn.Conv2d(1, 4, 2, stride=2), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    )


@case("U-Net")
def _() -> Case:
    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.inner = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
            self.up, self.last = nn.ConvTranspose2d(4, 3, 2, stride=2), nn.Conv2d(6, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            skip = torch.tanh(self.down(x))
            low = torch.tanh(self.inner(F.max_pool2d(skip, 2)))
            both = torch.cat([skip, F.interpolate(self.up(low), scale_factor=1.0, mode="nearest")], 1)
            return self.last(both).movedim(1, -1).reshape(len(x), -1, 3)

    case = images(UNet(), refusals={"NTK": "expected shape (4, C)"})
    case.target = torch.randint(3, (4, 64))
    return case


class SelfAttention(nn.Module):
    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        self.project, self.out, self.causal = nn.Linear(width, 3 * width), nn.Linear(width, width), causal

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.project(x).view(n, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(n, length, width))


class Transformer(nn.Module):
    """A block with norms first."""

    def __init__(self, width: int, causal: bool, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.attention, self.norms = SelfAttention(width, causal), nn.ModuleList([norm(width), norm(width)])
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    def __init__(self, tied: bool, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(7, 4), nn.Parameter(torch.randn(5, 4))
        self.block, self.head = Transformer(4, True, norm), nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embed(x) + self.positions))


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(1, 4, 4, stride=4), nn.Parameter(torch.randn(1, 1, 4))
        self.block, self.head = Transformer(4, False), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), 1, 4), self.patches(x).flatten(2).transpose(1, 2)], 1)
        return self.head(self.block(x)[:, 0])


NOT_FLAT = {"NTK": "expected shape (3, C)"}  # of the outputs of a sequence


@case("ViT")
def _() -> Case:
    return images(ViT())


@case("GPT")
def _() -> Case:
    return tokens(GPT(tied=False), refusals=NOT_FLAT)


@case("GPT, tied embeddings")
def _() -> Case:
    return tokens(GPT(tied=True), refusals=NOT_FLAT)


@case("GPT, RMSNorm")
def _() -> Case:
    return tokens(GPT(tied=True, norm=nn.RMSNorm), refusals=NOT_FLAT)


@case("GPT, loss from elsewhere")
def _() -> Case:
    return tokens(GPT(tied=True), as_tensor=True, refusals={"all": "got one through fused attention", **NOT_FLAT})


@case("GPT, checkpointed blocks")
def _() -> Case:
    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    model = GPT(tied=True)
    model.block = Checkpointed(model.block)
    return tokens(model, refusals=NOT_FLAT)


class Pooled(nn.Module):
    """A classifier of what a sequence model gives, on the average over the sequence."""

    def __init__(self, inner: nn.Module, width: int = 4, batch_first: bool = True) -> None:
        super().__init__()
        self.inner, self.head, self.batch_first = inner, nn.Linear(width, 3), batch_first

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return self.head((y[0] if isinstance(y, tuple) else y).mean(1))


@case("nn.TransformerEncoder (BERT)")
def _() -> Case:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, activation="gelu", batch_first=True)
    return sequences(Pooled(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)))


@case("nn.Transformer")
def _() -> Case:
    class Translator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Transformer(4, 2, 1, 1, 4, dropout=0.0, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.both(x, x.flip(1))

    return sequences(Pooled(Translator()))


@case("nn.MultiheadAttention")
def _() -> Case:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    return sequences(Pooled(Attention()))


for cls in (nn.RNN, nn.LSTM, nn.GRU):
    CASES[cls.__name__] = partial(lambda c: sequences(Pooled(c(4, 4, batch_first=True))), cls)


@case("GRUCell in a loop")
def _() -> Case:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRUCell(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            states = [x.new_zeros(len(x), 4)]
            for i in range(x.shape[1]):
                states.append(self.cell(x[:, i], states[-1]))
            return torch.stack(states, 1)

    return sequences(Pooled(Loop()))


class Mixture(nn.Module):
    """Of experts, by soft weights or by that of the best alone."""

    def __init__(self, hard: bool) -> None:
        super().__init__()
        self.router, self.hard = nn.Linear(3, 2), hard
        self.experts = nn.ModuleList([perceptron(nn.Tanh()) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        gates = self.router(x).softmax(-1)
        if self.hard:
            gates = gates * F.one_hot(gates.argmax(-1), 2)
        return sum(gates[:, i, None] * expert(x) for i, expert in enumerate(self.experts))  # type: ignore[return-value]


@case("mixture of experts")
def _() -> Case:
    return vectors(Mixture(hard=False))


@case("mixture of experts, the best alone")
def _() -> Case:
    return vectors(Mixture(hard=True))


def hidden_layer(wrap: Callable[[nn.Linear], nn.Module]) -> nn.Sequential:
    return nn.Sequential(wrap(nn.Linear(3, 6)), nn.Tanh(), nn.Linear(6, 3))


@case("weight_norm")
def _() -> Case:
    return vectors(hidden_layer(parametrizations.weight_norm), refusals=WRONG_TWICE)


@case("weight_norm, the old one")
def _() -> Case:
    return vectors(hidden_layer(nn.utils.weight_norm), refusals=WRONG_TWICE)


@case("spectral_norm in eval mode")
def _() -> Case:
    return vectors(hidden_layer(parametrizations.spectral_norm).eval())


@case("spectral_norm in train mode")
def _() -> Case:
    # A forward pass improves the vectors of the norm first, which are then constants.
    def improved(model: nn.Module) -> nn.Module:
        with torch.no_grad():
            model(torch.zeros(1, 3, dtype=torch.float64))
        return model.eval()

    # By differences they are no constants: every forward pass improves them for the weights that it sees.
    refusals = {"by differences": "not symmetric"}
    return vectors(hidden_layer(parametrizations.spectral_norm), plain=improved, refusals=refusals)


@case("orthogonal weights")
def _() -> Case:
    return vectors(hidden_layer(partial(parametrizations.orthogonal, orthogonal_map="cayley")))


@case("LoRA")
def _() -> Case:
    class LoRA(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base.requires_grad_(False)
            self.down, self.up = nn.Linear(3, 2, bias=False), nn.Linear(2, 6, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.up(self.down(x))

    return vectors(hidden_layer(LoRA))


@case("frozen first layer")
def _() -> Case:
    model = perceptron(nn.Tanh())
    model[0].requires_grad_(False)
    return vectors(model)


@case("first layer under no_grad")
def _() -> Case:
    class Cut(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return self.inner(x)

    text = "expected a gradient, got none, though its Linear ran"
    measures = ("Hessian", "by differences", "Gauss-Newton", "tracker", "density")
    return vectors(hidden_layer(Cut), refusals=dict.fromkeys(measures, text))


@case("nn.Embedding")
def _() -> Case:
    return tokens(nn.Sequential(nn.Embedding(7, 4), nn.Tanh(), nn.Linear(4, 7)), refusals=NOT_FLAT)


@case("nn.Embedding, sparse")
def _() -> Case:
    def dense(model: nn.Module) -> nn.Module:
        model[0].sparse = False
        return model

    model = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Tanh(), nn.Linear(4, 7))
    return tokens(model, plain=dense, refusals={"all": "build nn.Embedding with sparse=False", **NOT_FLAT})


@case("nn.EmbeddingBag")
def _() -> Case:
    case = tokens(
        nn.Sequential(nn.EmbeddingBag(7, 4), nn.Tanh(), nn.Linear(4, 3)),
        refusals=refused("got one through nn.EmbeddingBag"),
    )
    case.target = torch.tensor([0, 1, 2])
    return case


@case("Fourier operator")
def _() -> Case:
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4, 2) / 2)

        def forward(self, x: Tensor) -> Tensor:
            modes = torch.fft.rfft(x, dim=1) * torch.view_as_complex(self.weight)
            return torch.tanh(torch.fft.irfft(modes, n=x.shape[1], dim=1))

    return sequences(Pooled(Spectral()))


@case("graph convolution")
def _() -> Case:
    class GraphConvolution(nn.Module):
        edges = torch.tensor([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 2]])

        def __init__(self) -> None:
            super().__init__()
            self.message, self.own = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            source, sink = self.edges
            return torch.tanh(self.own(x).index_add(1, sink, self.message(x)[:, source]))

    return sequences(Pooled(GraphConvolution()))


@case("dropout in train mode")
def _() -> Case:
    return vectors(
        nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.5), nn.Linear(6, 3)),
        seed=1,
        refusals={"all": "other randomness off", "NTK": COUPLED},
    )


@case("CTC loss")
def _() -> Case:
    def ctc(outputs: Tensor, target: Tensor) -> Tensor:
        return F.ctc_loss(outputs.log_softmax(-1).transpose(0, 1), target, [5] * 3, [1] * 3)

    case = tokens(
        nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)), criterion=ctc, refusals={"all": "nn.CTCLoss", **NOT_FLAT}
    )
    case.target = torch.tensor([[1], [2], [3]])
    return case


@case("an autograd.Function, once differentiable")
def _() -> Case:
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.exp()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * ctx.saved_tensors[0].exp()

    class Exponential(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Opaque.apply(x)

    return vectors(perceptron(Exponential()), refusals=refused("got one through Opaque"))


def compiled(model: nn.Module) -> nn.Module:
    torch.compiler.reset()  # after many models of the same code it would compile no more
    return torch.compile(model, backend="aot_eager")


@case("torch.compile")
def _() -> Case:
    model = perceptron(nn.Tanh())
    return vectors(model, forward=compiled(model))


@case("torch.compile, loss from elsewhere")
def _() -> Case:
    model = perceptron(nn.Tanh())
    text = "got one through torch.compile"
    refusals = dict.fromkeys(("Hessian", "Gauss-Newton", "tracker", "density"), text)
    return vectors(model, forward=compiled(model), as_tensor=True, refusals=refusals)


@case("torch.jit.script")
def _() -> Case:
    model = perceptron(nn.Tanh()).double()
    return vectors(torch.jit.script(model), refusals={"NTK": "got a torch.jit.ScriptModule"})


@case("checkpoint")
def _() -> Case:
    model = perceptron(nn.Tanh())
    return vectors(model, forward=lambda x: model[2](checkpoint(model[:2], x, use_reentrant=False)))


@case("checkpoint, reentrant")
def _() -> Case:
    model = perceptron(nn.Tanh())
    measures = ("Hessian", "by differences", "Gauss-Newton", "tracker", "density")
    refusals = dict.fromkeys(measures, "expected a gradient, got none")
    return vectors(model, forward=lambda x: model[2](checkpoint(model[:2], x, use_reentrant=True)), refusals=refusals)


@case("bfloat16 autocast")
def _() -> Case:
    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)

    return vectors(perceptron(nn.Tanh()), context=autocast, dtype=torch.float32, tolerance=0.05)


@case("DistributedDataParallel")
def _() -> Case:
    model = perceptron(nn.Tanh()).double()
    refusals = dict.fromkeys(("Hessian", "Gauss-Newton", "tracker", "density"), "expected to call the plain module")
    return vectors(model, forward=nn.parallel.DistributedDataParallel(model), refusals=refusals)


@case("FSDP2")
def _() -> Case:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = perceptron(nn.Tanh()).double()
    whole = copy.deepcopy(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    text = "a tensor that is whole in this process, got a DTensor"
    return vectors(model, plain=lambda _: whole, refusals=refused(text) | {"NTK": text})


@case("Lightning module")
def _() -> Case:
    import lightning

    class Lit(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = perceptron(nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    return vectors(Lit())


class Logits(nn.Module):
    """A model of transformers by its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


# As BERT and Llama call them.
SIZES = {
    "hidden_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 4,
    "initializer_range": 0.5,
}


@case("transformers: BERT")
def _() -> Case:
    from transformers import BertConfig, BertForMaskedLM

    # No token for padding: its gradient leaves out that it is looked up.
    config = BertConfig(vocab_size=7, max_position_embeddings=5, type_vocab_size=1, pad_token_id=None, **SIZES)
    return tokens(Logits(BertForMaskedLM(config)).eval(), refusals=NOT_FLAT)


@case("transformers: GPT-2")
def _() -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=7, n_positions=5, n_embd=4, n_layer=1, n_head=2, n_inner=4, initializer_range=0.5)
    return tokens(Logits(GPT2LMHeadModel(config)).eval(), refusals=NOT_FLAT)


@case("transformers: Llama")
def _() -> Case:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=7, max_position_embeddings=8, **SIZES)
    # Its norms are computed in float32.
    return tokens(Logits(LlamaForCausalLM(config)).eval(), tolerance=1e-3, step=3e-4, refusals=NOT_FLAT)


@case("transformers: Llama, loss from elsewhere")
def _() -> Case:
    made = CASES["transformers: Llama"]()
    made.as_tensor = True
    made.refusals = {"all": "got one through fused attention", **NOT_FLAT}
    return made


def make(name: str) -> Case:
    """The case in float64, its weights large enough for a curvature to speak of."""
    torch.manual_seed(len(name))
    made = CASES[name]()
    made.model.to(made.dtype)
    if made.inputs.is_floating_point():
        made.inputs = made.inputs.to(made.dtype)
    return made
