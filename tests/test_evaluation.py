"""Evaluations leave no trace in buffers, and threads take turns."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from curvature_problems import X, Y
from torch import nn
from torch.utils.checkpoint import checkpoint

from dynloss_ext import HessianOperator, eigsh, trace


class Counter(nn.Module):
    """In training mode writes to one buffer and replaces another."""

    def __init__(self):
        super().__init__()
        self.register_buffer("written", torch.zeros(2))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("empty", None)

    def forward(self, x):
        if self.training:
            self.written += 1
            self.replaced = self.replaced + 1
        return x


def batch_norm_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), Counter(), nn.Linear(4, 3)).double()


def assert_same_state(model, before, tensors):
    assert model.training
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
        assert buffer is tensors[name], name


@pytest.mark.parametrize("how", ["call", "functional", "raises"])
def test_buffers_stay_as_they_were(how):
    model = batch_norm_model()
    params = list(model.parameters())
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    tensors = dict(model.named_buffers())

    def closure():
        if how == "functional":
            return F.cross_entropy(torch.func.functional_call(model, dict(model.named_buffers()), (X,)), Y)
        loss = F.cross_entropy(model(X), Y)
        if how == "raises":
            raise KeyError("mine")
        return loss

    if how == "raises":
        with pytest.raises(KeyError, match="mine"):
            HessianOperator(closure, params)
    else:
        dense = HessianOperator(closure, params).to_dense()
        assert dense.isfinite().all()
    assert_same_state(model, before, tensors)
    assert not nn.modules.module._global_forward_pre_hooks
    assert not nn.modules.module._global_forward_hooks


def test_buffers_of_a_vmapped_ensemble_stay_as_they_were():
    model = batch_norm_model()[:2]
    params, buffers = torch.func.stack_module_state([batch_norm_model()[:2] for _ in range(2)])
    before = {name: buffer.clone() for name, buffer in buffers.items()}

    def closure():
        outputs = torch.vmap(lambda p, b: torch.func.functional_call(model, (p, b), (X,)))(params, buffers)
        return (outputs**3).sum()

    H = HessianOperator(closure, params.values())
    assert all(torch.equal(buffers[name], before[name]) for name in before)
    assert (H @ torch.ones(H.shape[0], dtype=torch.float64)).isfinite().all()


def test_other_threads_keep_what_they_do_to_buffers_of_other_models():
    ours, theirs = batch_norm_model(), batch_norm_model()

    def closure():
        with ThreadPoolExecutor(1) as pool:
            pool.submit(theirs, X).result()
            return F.cross_entropy(pool.submit(ours, X).result(), Y)

    before = {name: buffer.clone() for name, buffer in ours.named_buffers()}
    tensors = dict(ours.named_buffers())
    HessianOperator(closure, ours.parameters())
    HessianOperator.from_batches(lambda _: (closure(), 1), ours.parameters(), [0]).to_dense()
    assert_same_state(ours, before, tensors)
    assert theirs[1].num_batches_tracked > 2


@pytest.mark.parametrize("pool_of_before", [False, True])
def test_a_closure_may_wait_for_threads_that_measure_curvature(pool_of_before):
    """Each within the other, on threads of before or of its own, and with the random state as it was."""
    w = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)

    def inner(power):
        if power == 3:
            return float(eigsh(HessianOperator(lambda: w.pow(3).sum() * measured(2), [w]), 1).values)
        return float(eigsh(HessianOperator.from_batches(lambda _: (w.pow(power).sum(), 1), [w], [0]), 1).values)

    def measured(power):
        if pool_of_before:
            return pool.submit(inner, power).result()
        with ThreadPoolExecutor(1) as own:
            return own.submit(inner, power).result()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: time.sleep(0.05), range(3)))
        state = torch.get_rng_state()
        H = HessianOperator(lambda: w.pow(2).sum() * measured(3), [w])
        assert torch.equal(torch.get_rng_state(), state)
    assert H.to_dense()[0, 0] == pytest.approx(2 * 6 * 3 * 2)


def test_evaluations_of_threads_take_turns():
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    state, inside, together = torch.get_rng_state(), [], []

    def closure():
        inside.append(1)
        time.sleep(0.1)  # outside of Python's threading
        together.append(len(inside))
        inside.pop()
        return w.square().sum()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: HessianOperator(closure, [w]), range(3)))
    assert set(together) == {1}
    assert torch.equal(torch.get_rng_state(), state)


class CountsAlways(Counter):
    """In eval mode, too."""

    def forward(self, x):
        self.written += 1
        self.replaced = self.replaced + 1
        return x


@pytest.mark.parametrize("scripted", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_buffers_written_in_eval_mode_or_in_script_stay_as_they_were(training, scripted):
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Sequential(CountsAlways()), nn.Linear(4, 3)).double()
    model.train(training)
    if scripted:
        model[2] = torch.jit.script(model[2])
        model[1] = torch.jit.script(model[1])
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    HessianOperator(lambda: F.cross_entropy(model(X), Y), model.parameters())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name


@pytest.mark.parametrize("dims", [(3, 4), (0, 4), (1, 1)])
def test_an_expanded_buffer_is_no_hindrance(dims):
    model = batch_norm_model()
    row = torch.arange(4.0, dtype=torch.float64)[: dims[1]]
    model[3].register_buffer("expanded", row.expand(*dims))

    def count(*_):
        row.add_(1)

    model[3].register_forward_hook(count)
    before = row.clone()
    HessianOperator(lambda: F.cross_entropy(model(X), Y), model.parameters())
    assert dims[0] == 0 or torch.equal(row, before)


def test_a_checkpoint_that_runs_again_in_every_product_keeps_its_buffers():
    model = batch_norm_model()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    params = list(model.parameters())

    def closure():
        return F.cross_entropy(checkpoint(model, X, use_reentrant=False), Y)

    H = HessianOperator(closure, params)
    loss = closure()
    tensors = dict(model.named_buffers())
    for name, buffer in tensors.items():
        buffer.data.copy_(before[name])
    for operator in (H, HessianOperator(loss, params)):
        eigsh(operator, 1)
        trace(operator, num_probes=6)
        operator @ torch.ones(operator.shape[0], dtype=torch.float64)
        assert_same_state(model, before, tensors)


def test_a_module_that_calls_itself_keeps_its_buffers():
    class Twice(Counter):
        def forward(self, x, again=True):
            x = super().forward(x)
            return self(x, again=False) if again else x

    model = batch_norm_model()
    model[3] = Twice()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    tensors = dict(model.named_buffers())
    HessianOperator(lambda: F.cross_entropy(model(X), Y), model.parameters())
    assert_same_state(model, before, tensors)


def test_batch_norm_product_is_that_of_the_batch():
    model = batch_norm_model()
    params = list(model.parameters())
    H = HessianOperator(lambda: F.cross_entropy(model(X), Y), params)
    dense = HessianOperator(F.cross_entropy(model(X), Y), params).to_dense()
    assert torch.allclose(H.to_dense(), dense, rtol=1e-12, atol=1e-14)
