"""DynamicCrossEntropyLoss(inplace_gradient=True): the same gradients, in the place of the logits."""

import pytest
import torch

from dynloss_ext import DynamicCrossEntropyLoss, Oscillation

SHAPES = [(1, 3), (40, 3), (1000, 10), (33, 31), (20, 33), (7, 1000), (5, 4, 6)]


def pair(shape: tuple[int, ...], dtype: torch.dtype, **options):
    """Leaves, logits made from them, targets with ignored ones, and the two losses."""
    generator = torch.Generator().manual_seed(0)
    leaf = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    target.view(-1)[1::5] = -100
    oscillation = Oscillation(shape[1], amplitude=9, period=10)
    losses = [DynamicCrossEntropyLoss(oscillation, inplace_gradient=inplace, **options) for inplace in (False, True)]
    for loss in losses:
        loss.current_step.fill_(7)
    return leaf, target, losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [{}, {"reduction": "sum", "label_smoothing": 0.1}, {"normalization": "weights"}])
def test_same_loss_and_gradient(shape, dtype, options) -> None:
    leaf, target, (plain, inplace) = pair(shape, dtype, **options)
    results = []
    for criterion in (plain, inplace):
        leaf.grad = None
        loss = criterion(leaf * 2, target)
        (3 * loss).backward()
        results.append((loss.detach(), leaf.grad))
    (loss, gradient), (inplace_loss, inplace_gradient) = results
    assert torch.equal(loss, inplace_loss)
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}.get(dtype, 8 * torch.finfo(dtype).eps)
    torch.testing.assert_close(inplace_gradient, gradient, rtol=tolerance, atol=tolerance * float(gradient.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 10), (3, 64, 10)])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_factor_is_not_rounded_to_the_half_type(dtype, shape, inplace) -> None:
    """A factor next to 1, which would be rounded to 1, and 2**17, beyond float16: neither may show."""
    leaf = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    target = leaf.detach().argmax(-1)
    amplitude = torch.tensor([2.0, 3.0, 4.0]) if len(shape) == 3 else 2.0
    criterion = DynamicCrossEntropyLoss(Oscillation(10, amplitude, 10), reduction="sum", inplace_gradient=inplace)

    def gradient(factor: float) -> torch.Tensor:
        return torch.autograd.grad(factor * criterion(leaf * 1, target).sum(), leaf)[0].double()

    factor = 1 + 0.45 * torch.finfo(dtype).eps
    assert (gradient(factor) / gradient(1.0)).mean().item() == pytest.approx(factor, abs=(factor - 1) / 2)
    target.fill_(-100)
    assert (gradient(2.0**17) == 0).all()


@pytest.mark.parametrize("layout", ["transposed", "sliced", "permuted"])
def test_any_strides(layout: str) -> None:
    leaf, target, (plain, inplace) = pair((40, 6), torch.float64)

    def logits() -> torch.Tensor:
        doubled = leaf * 2
        if layout == "transposed":
            return doubled.t().contiguous().t()
        if layout == "sliced":
            return torch.cat([doubled, doubled], 1)[:, :6]
        return doubled.reshape(5, 8, 6).permute(0, 2, 1)

    if layout == "permuted":
        target = target.view(5, 8)
    expected = torch.autograd.grad(plain(logits(), target), leaf)[0]
    torch.testing.assert_close(torch.autograd.grad(inplace(logits(), target), leaf)[0], expected)


def test_the_gradient_is_in_the_place_of_the_logits() -> None:
    leaf, target, (plain, inplace) = pair((40, 3), torch.float64)
    logits = leaf * 1
    version = logits._version
    loss = inplace(logits, target)
    assert logits._version > version
    torch.testing.assert_close(logits.detach(), torch.autograd.grad(plain(leaf, target), leaf)[0])
    received = []
    logits.register_hook(lambda g: received.append(g.data_ptr()))
    loss.backward()
    assert received == [logits.data_ptr()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])  # in float16 the mean is divided at the end
def test_a_kept_graph_gives_the_gradient_twice(dtype) -> None:
    leaf, target, (plain, inplace) = pair((40, 3), dtype)
    expected = torch.autograd.grad(2 * plain(leaf * 1, target), leaf)[0]
    loss = inplace(leaf * 1, target)
    first = torch.autograd.grad(2 * loss, leaf, retain_graph=True)[0].clone()
    tolerance = {"rtol": 2e-3, "atol": 1e-4} if dtype == torch.float16 else {}
    torch.testing.assert_close(first, expected, **tolerance)
    torch.testing.assert_close(torch.autograd.grad(2 * loss, leaf)[0], first, **tolerance)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaf)


def test_without_grad_the_logits_are_left_alone() -> None:
    leaf, target, (plain, inplace) = pair((40, 3), torch.float64)
    logits = leaf.detach().clone()
    assert torch.equal(inplace(logits, target), plain(logits, target))
    with torch.no_grad():
        inplace(leaf, target)
    assert torch.equal(logits, leaf)


def test_refusals_are_loud() -> None:
    leaf, target, (_, inplace) = pair((40, 3), torch.float64)
    with pytest.raises(RuntimeError, match="leaf that requires grad"):
        inplace(leaf, target)
    with pytest.raises(RuntimeError, match=r"differentiated again \(create_graph=True\)"):
        torch.autograd.grad(inplace(leaf * 1, target), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"expected False under torch\.func"):
        torch.func.grad(lambda z: inplace(z * 1, target))(leaf.detach())
    probabilities = leaf.softmax(-1)  # saved by softmax for its backward
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        inplace(probabilities, target).backward()
    logits = leaf * 1
    loss = inplace(logits, target)
    with torch.no_grad():
        logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(ValueError, match="inplace_gradient: expected reduction 'mean' or 'sum', got 'none'"):
        DynamicCrossEntropyLoss(inplace.oscillation, reduction="none", inplace_gradient=True)
    with pytest.raises(TypeError, match="inplace_gradient: expected a bool, got int"):
        DynamicCrossEntropyLoss(inplace.oscillation, inplace_gradient=1)
