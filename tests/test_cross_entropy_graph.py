"""The graph that the loss leaves: kept, freed, used again, shared, modified; what is saved in it and allocated."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cross_entropy_cases import PROBLEMS, Problem, close, labels, normal

from dynloss_ext import Oscillation, dynamic_cross_entropy

SINGLE = PROBLEMS["matrix"]


def test_step_is_saved_with_the_graph():
    """A step tensor that has moved on: first and second derivative are of the Γ of the forward pass."""
    z, step = SINGLE.logits, torch.tensor(3)
    at_three = Problem(z, SINGLE.target, SINGLE.oscillation, 3)
    for reduction in ("none", "mean"):
        x = z.clone().requires_grad_()
        step.fill_(3)
        loss = dynamic_cross_entropy(x, SINGLE.target, SINGLE.oscillation, step, reduction=reduction)
        step.add_(17)
        (plain,) = torch.autograd.grad(loss.sum(), x, retain_graph=True)
        close(plain, at_three.gradient(reduction=reduction))
        (g,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
        close(g.detach(), at_three.gradient(reduction=reduction))
        close(torch.autograd.grad(g, x, z)[0], at_three.hvp(z, reduction=reduction))


@pytest.mark.parametrize("name", PROBLEMS)
def test_graph_kept_and_used_again(name):
    problem = PROBLEMS[name]
    gradient, v = problem.gradient(), torch.randn_like(problem.logits)
    x = problem.leaf()
    loss = problem.loss(x).sum()
    for factor in (1.0, -2.0, 0.0):
        close(torch.autograd.grad(factor * loss, x, retain_graph=True)[0], factor * gradient)
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    close(torch.autograd.grad(g, x, v)[0], problem.hvp(v))
    close(torch.autograd.grad(3 * loss, x)[0], 3 * gradient)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_accumulated_and_stolen_gradients_are_nobody_elses():
    gradient, x = SINGLE.gradient(), SINGLE.leaf()
    SINGLE.loss(x).backward()
    first = x.grad
    SINGLE.loss(x).backward()
    close(x.grad, 2 * gradient)
    x.grad = None
    loss = SINGLE.loss(x)
    loss.backward(retain_graph=True)
    x.grad.zero_()
    kept = x.grad
    x.grad = None
    loss.backward()
    close(x.grad, gradient)
    assert (kept == 0).all()
    assert first is not x.grad
    y = SINGLE.leaf()
    hidden = y * 1
    (SINGLE.loss(hidden) + 2 * SINGLE.loss(hidden) + hidden.sum()).backward()
    close(y.grad, 3 * gradient + 1)


def test_inplace_change_of_what_was_saved_is_noticed():
    for changed in ("logits", "target"):
        x, target = SINGLE.leaf(), SINGLE.target.clone()
        hidden = x * 1
        loss = dynamic_cross_entropy(hidden, target, SINGLE.oscillation, SINGLE.step)
        (hidden if changed == "logits" else target).mul_(1)
        close(torch.autograd.grad(loss, x, retain_graph=True)[0], SINGLE.gradient())  # computed before the change
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, x, create_graph=True)
    x = SINGLE.leaf()
    hidden = x * 1
    loss = SINGLE.loss(hidden, reduction="none")
    hidden.mul_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


def test_saved_tensor_hooks_see_tensors_that_stay_as_they_are():
    seen = []
    x = SINGLE.leaf()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.append(t), t)[1], lambda t: t):
        loss = SINGLE.loss(x)
    before = [t.clone() for t in seen]
    (2 * loss).backward()
    close(x.grad, 2 * SINGLE.gradient())
    assert all(torch.equal(a, b) for a, b in zip(seen, before, strict=True))
    assert x.grad.data_ptr() not in {t.data_ptr() for t in seen}


@pytest.mark.parametrize("order", [1, 2])
def test_saved_tensors_may_be_moved_away(order):
    packed = []
    x, v = SINGLE.leaf(), normal(6, 4, seed=1)

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.detach().numpy().copy()

    with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):
        loss = SINGLE.loss(x)
        (g,) = torch.autograd.grad(loss, x, create_graph=order == 2)
    close(g.detach(), SINGLE.gradient())
    assert packed
    with torch.autograd.graph.save_on_cpu():
        (g,) = torch.autograd.grad(SINGLE.loss(x), x, create_graph=True)
    close(torch.autograd.grad(g, x, v)[0], SINGLE.hvp(v))
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        hidden = x * 1
        loss = SINGLE.loss(hidden)
        hidden.mul_(0)
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        close(g.detach(), SINGLE.gradient())


def test_a_kept_graph_does_not_write_where_hooks_keep_the_gradient():
    """What an unpack hook makes may be new, and of the packed memory all the same."""
    x = SINGLE.leaf()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach().numpy().copy(), torch.from_numpy):
        loss = SINGLE.loss(x)
    for _ in range(2):
        close(torch.autograd.grad(2 * loss, x, retain_graph=True)[0], 2 * SINGLE.gradient())
    (g,) = torch.autograd.grad(loss, x, retain_graph=True)
    g.zero_()
    close(torch.autograd.grad(loss, x)[0], SINGLE.gradient())


def test_concurrent_backward_passes():
    x = SINGLE.leaf()
    loss = SINGLE.loss(x)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: torch.autograd.grad(loss, x, retain_graph=True)[0], range(16)))
    assert all(torch.equal(r, results[0]) for r in results)


def test_inference_mode_and_no_grad():
    x = SINGLE.leaf()
    expected = SINGLE.twin(SINGLE.logits)
    with torch.no_grad():
        assert not SINGLE.loss(x).requires_grad
    with torch.inference_mode():
        close(SINGLE.loss(x), expected)
        inference = SINGLE.logits.clone()
    close(SINGLE.loss(inference), expected)
    close(copy.deepcopy(SINGLE.loss(SINGLE.logits)), expected)


def test_a_training_step_allocates_one_gradient_and_inference_nothing():
    x, target = normal(512, 1000, dtype=torch.float32).requires_grad_(), labels(1000, 512)
    oscillation = Oscillation(1000, 9, 10)
    size = x.numel() * x.element_size()

    def large_allocations(function):
        with torch.profiler.profile(profile_memory=True) as profile:
            function()
        # Every op counts its own, not its callees'.
        return sum(max(0, event.self_cpu_memory_usage) for event in profile.events())

    step = large_allocations(lambda: dynamic_cross_entropy(x, target, oscillation, 3).backward())
    assert size <= step <= 1.05 * size
    with torch.no_grad():
        assert large_allocations(lambda: dynamic_cross_entropy(x, target, oscillation, 3)) <= 0.05 * size
