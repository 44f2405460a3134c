"""Models that torch, left alone, differentiates once, or whose graphs lose a part."""

import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from curvature_problems import hessian_by_differences
from processes import run_python
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from dynloss_ext import (
    EigenTracker,
    GaussNewtonOperator,
    HessianOperator,
    eigsh,
    ntk_eigenvalues,
    spectral_density,
    trace,
)
from dynloss_ext._double_backward import double_backward


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Attention(nn.Module):
    """One head over a sequence of 4, by the fused operator; (N, 4, 3) to (N, 2)."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(3, 6)
        self.head = nn.Linear(2, 2)

    def forward(self, x):
        q, k, v = self.project(x).unsqueeze(1).chunk(3, -1)  # heads are the second dimension
        return self.head(F.scaled_dot_product_attention(q, k, v, is_causal=True)).mean((1, 2))


class Checkpointed(Attention):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def attention(cls=Attention):
    model = cls().double()
    x, y = torch.randn(5, 4, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1])
    return model, x, y


def process_settings():
    from torch._dynamo.eval_frame import _stance

    kernels = [torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()]
    return *kernels, torch.backends.cuda.math_sdp_enabled(), _stance.stance


def relative_error(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("cls", [Attention, Checkpointed])
def test_a_closure_with_fused_attention_has_its_hessian(cls):
    model, x, y = attention(cls)

    def loss():
        return F.cross_entropy(model(x), y)

    expected = hessian_by_differences(loss, model.parameters())
    H = HessianOperator(loss, model.named_parameters())
    assert relative_error(H.to_dense(), expected) < 1e-8
    top = torch.linalg.eigvalsh(expected)[-1]
    assert float(eigsh(H, 1, tol=1e-8).values) == pytest.approx(float(top), rel=1e-6)
    assert float(EigenTracker(k=1, tol=1e-8).update(H).values) == pytest.approx(float(top), rel=1e-6)
    assert trace(H, num_probes=3 * len(expected)).value == pytest.approx(float(expected.trace()), rel=1e-6)
    assert spectral_density(H, num_steps=5, num_probes=1).num_hvp == 5

    H = HessianOperator.from_batches(
        lambda rows: (F.cross_entropy(model(x[rows]), y[rows], reduction="sum"), len(rows)),
        model.named_parameters(),
        torch.arange(5).split(2),
    )
    assert relative_error(H.to_dense(), expected) < 1e-8


def test_gauss_newton_of_fused_attention():
    model, x, y = attention()

    def parts(rows):
        outputs = model(x[rows])
        return F.cross_entropy(outputs, y[rows], reduction="sum"), outputs, len(rows)

    G = GaussNewtonOperator.from_batches(parts, model.parameters(), torch.arange(5).split(2))
    with sdpa_kernel(SDPBackend.MATH):
        outputs = model(x)
        expected = GaussNewtonOperator(F.cross_entropy(outputs, y), outputs, model.parameters()).to_dense()
    assert relative_error(G.to_dense(), expected) < 1e-12


def test_ntk_of_fused_attention():
    model, x, _ = attention()
    with sdpa_kernel(SDPBackend.MATH):
        outputs = model(x)
        rows = [torch.autograd.grad(z, list(model.parameters()), retain_graph=True) for z in outputs.reshape(-1)]
    jacobian = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
    expected = torch.linalg.eigvalsh(jacobian @ jacobian.T).flip(0)[:3]
    assert torch.allclose(ntk_eigenvalues(model, x, 3, outputs="full"), expected, rtol=1e-8)


def test_a_compiled_module_runs_uncompiled_in_a_closure():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    compiled, x = torch.compile(net, backend="aot_eager"), torch.randn(5, 3, dtype=torch.float64)

    def loss(module):
        return module(x).square().mean()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        H = HessianOperator(lambda: loss(compiled), net.parameters())
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="when there are global hooks"):  # those of others
        compiled(x)
    hook.remove()
    assert torch.equal(H.to_dense(), HessianOperator(loss(net), net.parameters()).to_dense())
    with pytest.raises(RuntimeError, match=r"loss: expected .* twice, got one through torch.compile: give a closure"):
        HessianOperator(loss(compiled), net.parameters())


def test_settings_of_the_process_are_put_back():
    model, x, _ = attention()
    torch.compile(lambda: None)  # imports the compiler
    before = process_settings()
    inside = []

    def loss():
        inside.append(process_settings())
        return model(x).square().mean()

    H = HessianOperator(loss, model.parameters())
    assert set(inside) == {(False, False, True, "force_eager")}
    assert process_settings() == before

    def fails():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        HessianOperator(fails, model.parameters())
    with pytest.raises(KeyError, match="mine"):
        eigsh(lambda v: fails(), 1, n=3)
    H @ torch.ones(H.shape[0], dtype=H.dtype)
    assert process_settings() == before


def test_settings_last_as_long_as_any_thread_needs_them():
    before, inside, entered, leave = process_settings(), [], threading.Event(), threading.Event()

    def long():
        with double_backward():
            entered.set()
            leave.wait(10)
            inside.append(process_settings())

    thread = threading.Thread(target=long)
    thread.start()
    assert entered.wait(10)
    with double_backward():
        pass
    leave.set()
    thread.join()
    assert inside[0][:3] == (False, False, True)
    assert process_settings() == before


def test_settings_that_another_thread_has_taken_meanwhile_stay():
    """Its own end, later, is what puts them back."""
    before = process_settings()
    cuda = torch.backends.cuda
    with double_backward():
        cuda.enable_flash_sdp(True)
        other = torch.compiler.set_stance("eager_on_recompile")
    assert cuda.flash_sdp_enabled()
    assert process_settings()[3] == "eager_on_recompile"
    cuda.enable_mem_efficient_sdp(before[1])
    other.__exit__(None, None, None)
    torch.compiler.set_stance("default")
    assert process_settings() == before


def test_attention_chosen_before_by_another_thread_is_put_back_by_it_alone():
    before = process_settings()
    outer = sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION)
    outer.__enter__()
    with double_backward():
        outer.__exit__(None, None, None)
    assert process_settings() == before


COMPILED_FIRST_IN_A_CLOSURE = """
import sys, torch
from dynloss_ext import HessianOperator
assert "torch._dynamo" not in sys.modules
w = torch.linspace(-1, 1, 3, dtype=torch.float64, requires_grad=True)
loss = lambda: torch.compile(lambda w: w.exp().sum(), backend="aot_eager")(w)
if sys.argv[1] == "batches":
    H = HessianOperator.from_batches(lambda _: (loss(), 1), [w], [0, 1])
    factor = 2 / 2
else:
    H, factor = HessianOperator(loss, [w]), 1
assert torch.allclose(H.to_dense(), factor * torch.diag(w.detach().exp()))
"""


@pytest.mark.parametrize("how", ["whole", "batches"])
def test_what_is_compiled_first_in_the_closure_runs_uncompiled_too(how):
    run_python("-c", COMPILED_FIRST_IN_A_CLOSURE, how)


def single_derivatives():
    a = torch.randn(4, 3, requires_grad=True)
    q = torch.randn(1, 1, 4, 2, requires_grad=True)
    logits = torch.randn(6, 2, 5, requires_grad=True)
    bag = torch.randn(5, 3, requires_grad=True)
    rows = torch.tensor([0, 1, 2, 0])
    yield "attention", F.scaled_dot_product_attention(q, q, q).sum(), q, r"fused attention: .* give a closure"
    yield "bag", F.embedding_bag(rows.view(2, 2), bag).square().sum(), bag, "nn.EmbeddingBag: .*nn.Embedding"
    yield "cdist", torch.cdist(a, torch.zeros(2, 3)).sum(), a, "torch.cdist: .*vector_norm"
    ctc = F.ctc_loss(logits.log_softmax(-1), torch.tensor([[1, 2], [3, 4]]), [6, 6], [2, 2])
    yield "ctc", ctc, logits, "nn.CTCLoss"
    yield "margin", F.multi_margin_loss(a, rows), a, "a margin loss"
    positive = torch.rand(4, requires_grad=True)
    yield "none", torch.special.gammainc(positive, torch.ones(4)).sum(), positive, "igamma: input has no derivative"
    lengths = torch.tensor([5, 7])
    reduced = torch.segment_reduce(a.reshape(-1), "mean", lengths=lengths).square().sum()
    yield "another", reduced, a, "the operator segment_reduce: segment_reduce has a first derivative only"


@pytest.mark.parametrize(("loss", "param", "message"), [pytest.param(*c[1:], id=c[0]) for c in single_derivatives()])
def test_one_error_for_all_that_has_one_derivative(loss, param, message):
    if message.startswith("torch.cdist") and torch.__version__ >= "2.14":
        pytest.skip("this torch differentiates cdist twice")
    with pytest.raises(
        RuntimeError, match=r"loss: expected one that torch can differentiate twice, got one .*" + message
    ):
        HessianOperator(loss, [param]) @ torch.ones(param.numel())
    with pytest.raises(RuntimeError, match=message):
        eigsh(HessianOperator(loss, [param]), 1)


def test_a_checkpoint_around_fused_attention_from_elsewhere():
    model, x, y = attention(Checkpointed)
    with pytest.raises(
        RuntimeError, match="got one through a checkpoint whose forward pass took fused attention: give"
    ):
        HessianOperator(F.cross_entropy(model(x), y), model.parameters())


class Exponential(torch.autograd.Function):
    """Right in its first derivative; a second one is lost."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].exp()


class OnceExponential(Exponential):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return Exponential.backward(ctx, g)


def test_functions_that_are_differentiable_once_are_refused():
    x = torch.randn(3, requires_grad=True)
    for loss in (OnceExponential.apply(x).sum(), OnceExponential.apply(x).square().sum()):
        with pytest.raises(RuntimeError, match="OnceExponential, an autograd"):
            HessianOperator(loss, [x])
    z = OnceExponential.apply(x)
    with pytest.raises(RuntimeError, match="OnceExponential"):
        GaussNewtonOperator(z.square().sum(), z, [x])


def test_functions_of_the_user_are_named():
    x = torch.randn(3, requires_grad=True)
    with pytest.warns(
        UserWarning, match=r"only as right as that of the autograd.Function Exponential: .*gradgradcheck"
    ):
        H = HessianOperator(Exponential.apply(x).sum(), [x])
    assert torch.allclose(H.to_dense(), torch.diag(x.detach().exp()))


def two_layers():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    return net, torch.randn(5, 3, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("make", ["reentrant", "no_grad", "detached"])
def test_a_layer_that_ran_without_grad_is_refused(make):
    net, x = two_layers()

    class Detached(nn.Linear):
        def forward(self, x):
            return super().forward(x).detach()

    def features():
        if make == "reentrant":
            return checkpoint(net[:2], x, use_reentrant=True)
        with torch.set_grad_enabled(make == "detached"):
            return net[:2](x)

    if make == "detached":
        net[0].__class__ = Detached
    message = r": expected a gradient, got none, though its (Linear|Detached) ran: without grad.* shape \(4, 3\) out"
    with pytest.raises(ValueError, match=r"params\[0\]" + message):
        HessianOperator(lambda: net[2](features()).square().sum(), net.parameters())
    with pytest.raises(ValueError, match=r"0\.weight" + message):
        HessianOperator(lambda: net[2](features()).square().sum(), net.named_parameters())

    def closure(whole):
        return net[2](net[:2](x) if whole else features()).square().sum(), 5

    def in_batches(wholes):
        return HessianOperator.from_batches(closure, net.named_parameters(), wholes)

    with pytest.raises(ValueError, match=r"0\.weight" + message):
        in_batches([False, False])
    if make == "reentrant":  # lost without a word of whoever wrote the closure, in one batch only
        with pytest.raises(ValueError, match=r"0\.weight" + message):
            in_batches([True, False])
    elif make == "no_grad":
        constant = features()
        expected = sum(
            hessian_by_differences(lambda z=z: net[2](z()).square().sum(), net.parameters())
            for z in (lambda: net[:2](x), lambda: constant)
        )
        for wholes in ([True, False], [False, True]):
            assert relative_error(in_batches(wholes).to_dense(), expected / 10) < 1e-8
    H = HessianOperator(lambda: net[2](features()).square().sum(), net[2].parameters())
    assert torch.allclose(
        H.to_dense(), hessian_by_differences(lambda: net[2](features()).square().sum(), net[2].parameters())
    )


def test_a_layer_that_also_ran_without_grad_is_not():
    net, x = two_layers()

    def loss():
        with torch.no_grad():
            target = net(x)
        return (net(x + 1) - target).square().sum()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HessianOperator(loss, net.parameters())


def test_parameters_out_of_reach_are_named_in_a_warning():
    net, x = two_layers()
    head = nn.Linear(4, 1).double()  # runs, and is not used
    everything = nn.ModuleDict({"net": net, "head": head})
    zeros = r"no gradient of the loss reaches head\.weight \(1, 4\), head\.bias \(1,\): rows and columns of zeros"

    def loss():
        features = net[:2](x)
        head(features)
        return net[2](features).square().sum()

    with pytest.warns(UserWarning, match=zeros):
        H = HessianOperator(loss, everything.named_parameters())
    assert torch.equal(H.to_dense()[-5:], torch.zeros(5, 26, dtype=torch.float64))
    with pytest.warns(UserWarning, match=r"reaches params\[4\] \(1, 4\), params\[5\] \(1,\): rows"):
        HessianOperator(loss(), everything.parameters())
    with pytest.warns(UserWarning, match=zeros):
        HessianOperator.from_batches(lambda _: (loss(), 1), everything.named_parameters(), [0, 1])
    with pytest.warns(UserWarning, match=zeros):
        HessianOperator.layers(
            loss, {"net": net.named_parameters(), "head": [("head.weight", head.weight), ("head.bias", head.bias)]}
        )
    outputs = net(x)
    with pytest.warns(UserWarning, match=zeros):
        GaussNewtonOperator(outputs.square().sum(), outputs, everything.named_parameters())
    many = [torch.ones(1, dtype=torch.float64, requires_grad=True) for _ in range(8)]
    with pytest.warns(UserWarning, match=r"reaches .*params\[8\] \(1,\) and 3 more: rows"):
        HessianOperator(loss(), [*net.parameters(), *many])


def test_a_parameter_reached_in_one_batch_is_reached():
    experts = [torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        H = HessianOperator.from_batches(lambda i: (experts[i].pow(3).sum(), 1), experts, [0, 1])
    assert torch.equal(H.to_dense(), 3 * torch.eye(4, dtype=torch.float64))


def test_pairs_of_tensors_are_no_named_parameters():
    net, x = two_layers()
    with pytest.raises(TypeError, match=r"params\[0\]: expected a torch.Tensor, got tuple"):
        HessianOperator(net(x).square().sum(), [(net[0].weight, net[0].bias)])


def test_a_penalty_that_takes_the_whole_gradient_away_is_noticed():
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    outputs = w * 1.0
    with pytest.raises(ValueError, match=r"loss: expected one that depends on params through outputs alone, got one"):
        GaussNewtonOperator(outputs.square().sum() - w.square().sum(), outputs, [w])


def test_the_functions_of_batches_are_named_once():
    x = torch.randn(3, requires_grad=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        H = HessianOperator.from_batches(lambda i: (Exponential.apply(x).sum() * i, 1), [x], [1, 2, 3])
        H @ torch.ones(3)
    assert [str(w.message).partition(":")[0] for w in caught] == ["loss"]


def test_names_of_parameters_in_errors():
    net, x = two_layers()
    net[2].bias.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"^2\.bias: expected a tensor that requires grad, got a tensor of shape \(1,\)"
    ):
        HessianOperator(net(x).sum(), net.named_parameters())


@pytest.mark.parametrize("made_before", [True, False])
def test_a_graph_that_a_backward_pass_has_freed_is_refused_with_what_to_do(made_before):
    net, x = two_layers()
    loss = net(x).square().sum()
    H = HessianOperator(loss, net.parameters()) if made_before else None
    loss.backward()
    with pytest.raises(RuntimeError, match=r"^loss: expected one whose graph is there, got .* H\.gradients"):
        eigsh(H or HessianOperator(loss, net.parameters()), k=1)
