"""PerceptronEnsemble: many networks at once, each as if it were alone."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from common.spiral import SpiralMLP, spiral_data
from dynloss_ext import (
    EigenTracker,
    HessianOperator,
    Oscillation,
    Perceptron,
    PerceptronEnsemble,
    dynamic_cross_entropy,
    eigsh,
    spectral_density,
    trace,
)


def spirals(points=10, classes=3):
    return spiral_data(points, classes)


def ensemble(members=3, *, points=10, hidden=12, **options):
    inputs, target = spirals(points)
    oscillation = Oscillation(3, torch.linspace(1, 70, members), torch.linspace(10, 40, members))
    return PerceptronEnsemble(inputs, target, oscillation, **({"hidden": hidden, "lr": 0.5} | options))


def loss_of(made, member, module):
    inputs, target = spirals()
    amplitude, period = (x[member].item() for x in (made.oscillation.amplitude, made.oscillation.period))
    return dynamic_cross_entropy(module(inputs), target, Oscillation(3, amplitude, period), made.step)


# ---- one and the same network


@pytest.mark.parametrize("init", ["glorot-normal", "lecun-normal"])
def test_initial_values_are_those_of_the_spiral_script(init):
    made = ensemble(2, seeds=[5, 3], init=init)
    for member, seed in enumerate((5, 3)):
        network = SpiralMLP.initialised(init, 2, 12, 3, seed)
        expected = (network.w1.t(), network.b1[:, 0], network.w2.t(), network.b2[:, 0])
        for name, value in zip(("w1", "b1", "w2", "b2"), expected, strict=True):
            assert torch.equal(made.parameters[name][member], value)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_training_is_that_of_the_module(activation, momentum):
    made = ensemble(activation=activation, momentum=momentum)
    modules = [made.member(m) for m in range(3)]
    records = made.train(30)
    assert made.step == 30 and records.step.tolist() == list(range(30))
    inputs, target = spirals()
    for m, module in enumerate(modules):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5, momentum=momentum)
        oscillation = Oscillation(3, made.oscillation.amplitude[m].item(), made.oscillation.period[m].item())
        for step in range(30):
            optimizer.zero_grad()
            dynamic_cross_entropy(module(inputs), target, oscillation, step).backward()
            optimizer.step()
            with torch.no_grad():
                logits = module(inputs)
                weighted = dynamic_cross_entropy(logits, target, oscillation, step + 1)
                plain = nn.functional.cross_entropy(logits, target)
                accuracy = (logits.argmax(1) == target).double().mean()
            for column, value in ((records.weighted_loss, weighted), (records.loss, plain)):
                torch.testing.assert_close(column[step, m], value, rtol=1e-10, atol=0)
            assert records.accuracy[step, m] == accuracy
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(made.parameters[name][m], parameter.detach(), rtol=1e-10, atol=1e-12)


def test_gradient_product_and_operator_are_those_of_the_module():
    made = ensemble()
    made.train(7)
    loss, gradient = made.gradient()
    v = torch.randn(3, made.num_parameters, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    products = made.hvp(v)
    for m in range(3):
        module = made.member(m)
        value = loss_of(made, m, module)
        expected = torch.autograd.grad(value, list(module.parameters()), retain_graph=True)
        torch.testing.assert_close(loss[m], value.detach(), rtol=1e-13, atol=0)
        torch.testing.assert_close(gradient[m], torch.cat([x.reshape(-1) for x in expected]), rtol=1e-12, atol=1e-15)
        general = HessianOperator(loss_of(made, m, module), module.parameters())
        torch.testing.assert_close(products[m], general @ v[m], rtol=1e-12, atol=1e-13)
        operator = made.hessian(m)
        operator @ v[0]  # lays out what later ones use
        assert torch.equal(operator @ v[m], products[m])


def test_eigenvalues_are_those_of_the_dense_hessian():
    made = ensemble()
    made.train(20)
    result = made.eigenvalues(3, tol=1e-8, vectors=True)
    tracker = EigenTracker(3, tol=1e-8)
    for m in range(3):
        dense = made.hessian(m).to_dense()
        expected = torch.linalg.eigvalsh(dense).flip(0)[:3]
        torch.testing.assert_close(result.values[m], expected, rtol=1e-7, atol=1e-9)
        vectors = result.vectors[m]
        errors = (dense @ vectors - vectors * result.values[m]).norm(dim=0)
        torch.testing.assert_close(errors, result.residuals[m], rtol=1e-3, atol=1e-11)
        torch.testing.assert_close(eigsh(made.hessian(m), 3, tol=1e-8).values, expected, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(tracker.update(made.hessian(m)).values, expected, rtol=1e-7, atol=1e-9)
        estimate = trace(made.hessian(m), num_probes=60)
        assert abs(estimate.value - float(dense.trace())) < 5 * estimate.stderr
        assert spectral_density(made.hessian(m), num_steps=10, num_probes=2).grid.numel() > 0
    assert bool(result.converged.all()) and bool((result.num_hvp > 3).all())
    made.train(1)
    again = made.eigenvalues(3, start=result, audit=False)
    assert bool((again.num_hvp < result.num_hvp).all()) and again.vectors is None
    torch.testing.assert_close(again.values, made.eigenvalues(3).values, rtol=1e-5, atol=1e-6)


def test_eigenvalues_do_not_depend_on_threads():
    made = ensemble(5)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = made.eigenvalues(2)
        torch.set_num_threads(3)
        assert torch.equal(made.eigenvalues(2).values, expected.values)
    finally:
        torch.set_num_threads(threads)


def test_an_operator_in_threads():
    """They share what was laid out for its products."""
    operator = ensemble(points=100, hidden=100).hessian(1)
    alone = [eigsh(operator, 4, tol=1e-10, seed=seed).values for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = pool.map(lambda seed: eigsh(operator, 4, tol=1e-10, seed=seed).values, range(8))
        assert all(map(torch.equal, together, alone))


def test_a_direction_that_does_not_fit():
    op = ensemble().hessian(0)._op
    for v in (torch.ones(op.size, dtype=torch.float32), torch.ones(op.size - 1, dtype=torch.float64)):
        with pytest.raises(ValueError, match="v: expected a tensor like the parameters, Double of shape"):
            op.apply(v)


def test_an_operator_is_of_its_step():
    made = ensemble()
    v = torch.ones(made.num_parameters, dtype=torch.float64)
    operator = made.hessian(0)
    made.train(1)
    with pytest.raises(RuntimeError, match="hessian: expected the ensemble as it was at step 0"):
        operator @ v
    operator = made.hessian(0)
    made.parameters["b2"][0, 0] += 1
    with pytest.raises(RuntimeError, match="hessian: expected the ensemble as it was at step 1"):
        eigsh(operator, 1)
    operator = made.hessian(0)
    made._inputs.add_(1)
    with pytest.raises(RuntimeError, match="hessian: expected the ensemble as it was at step 1"):
        operator @ v
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        pickle.dumps(operator)


def test_a_member_that_is_not_finite():
    made = ensemble(lr=[0.5, 1e150, 0.5])
    alone = ensemble(lr=0.5)
    records, expected = made.train(20), alone.train(20)
    assert made.finite.tolist() == [True, False, True]
    assert torch.equal(records.loss[:, [0, 2]], expected.loss[:, [0, 2]])
    assert bool(records.loss[-1].isnan().tolist() == [False, True, False])
    assert all(bool(x.isfinite().all()) for x in made.parameters.values())
    loss, gradient = made.gradient()
    products = made.hvp(torch.ones_like(gradient))
    values = made.eigenvalues(2).values
    for x in (loss, gradient, products, values):
        assert bool(x[1].isnan().all()) and bool(x[[0, 2]].isfinite().all())
    assert bool((made.hessian(1) @ torch.ones(made.num_parameters, dtype=torch.float64)).isnan().all())


# ---- states


def test_a_state_goes_on_bit_for_bit():
    made, other = ensemble(momentum=0.8), ensemble(momentum=0.8, seeds=[7, 8, 9])
    made.train(11)
    other.load_state_dict(pickle.loads(pickle.dumps(made.state_dict())))
    expected, records = made.train(13), other.train(13)
    assert other.step == 24 and torch.equal(records.weighted_loss, expected.weighted_loss)
    for name, parameter in made.parameters.items():
        assert torch.equal(other.parameters[name], parameter)
    with pytest.raises(
        ValueError, match=r"state: expected one of an ensemble like this, got another: expected lr\[0\] = "
    ):
        ensemble(momentum=0.8, lr=0.1).load_state_dict(made.state_dict())
    with pytest.raises(ValueError, match="expected amplitude"):
        PerceptronEnsemble(*spirals(), Oscillation(3, 5, 10), hidden=12, lr=[0.5] * 3, momentum=0.8).load_state_dict(
            made.state_dict()
        )
    with pytest.raises(ValueError, match="state: expected the entries"):
        made.load_state_dict({"step": 3})
    with pytest.raises(TypeError, match="state: expected a dict"):
        made.load_state_dict(3)


def test_records_in_parts_and_none():
    made, whole = ensemble(), ensemble()
    parts = [made.train(steps, record_every=4) for steps in (0, 1, 1, 1, 1, 9)]  # three of them without a row
    expected = whole.train(13, record_every=4)
    assert torch.cat([part.step for part in parts]).tolist() == expected.step.tolist() == [0, 4, 8, 12]
    assert torch.equal(torch.cat([part.accuracy for part in parts]), expected.accuracy)
    assert parts[0].loss.shape == (0, 3)


# ---- members and their number


def test_the_number_of_members_follows_from_any_argument():
    inputs, target = spirals()
    one = Oscillation(3, 70, 10)
    options = {"hidden": 4, "lr": 0.1}
    values = {"w1": torch.ones(5, 2, 4), "b1": torch.ones(4), "w2": torch.ones(4, 3), "b2": torch.ones(5, 3)}
    assert PerceptronEnsemble(inputs, target, one, **options).num_members == 1
    for arguments, more in [
        ((inputs.expand(5, -1, -1), target, one), {}),
        ((inputs, target.expand(5, -1), one), {}),
        ((inputs, target, Oscillation(3, torch.ones(5), 10)), {}),
        ((inputs, target, one), {"lr": [0.1] * 5}),
        ((inputs, target, one), {"momentum": torch.full((5,), 0.5)}),
        ((inputs, target, one), {"seeds": range(5)}),
        ((inputs, target, one), {"init": values}),
    ]:
        made = PerceptronEnsemble(*arguments, **(options | more))
        assert made.num_members == 5 and made.train(1).loss.shape == (1, 5)
    with pytest.raises(ValueError, match="seeds: expected one or 2, as many as lr has, got 3"):
        PerceptronEnsemble(inputs, target, one, hidden=4, lr=[0.1, 0.2], seeds=[1, 2, 3])


def test_a_member_is_a_copy():
    made = ensemble()
    module = made.member(-1)
    assert isinstance(module, Perceptron) and "hidden=12" in repr(module)
    before = made.parameters["w1"].clone()
    with torch.no_grad():
        module.w1.zero_()
    assert torch.equal(made.parameters["w1"], before)
    again = Perceptron(*(torch.zeros_like(p) for p in module.parameters()))
    again.load_state_dict(module.state_dict())
    with pytest.raises(IndexError, match="member: expected one of 3, got 3"):
        made.member(3)
    with pytest.raises(TypeError, match="member: expected an int"):
        made.hessian(1.0)


@pytest.mark.parametrize("change, message", [
    ({"inputs": torch.zeros(30)}, "inputs: expected floating-point numbers of shape"),
    ({"inputs": torch.zeros(30, 2, dtype=torch.int64)}, "inputs: expected floating-point"),
    ({"inputs": torch.full((30, 2), torch.nan)}, "inputs: expected finite numbers"),
    ({"target": torch.zeros(29, dtype=torch.int64)}, "target: expected int64 of shape"),
    ({"target": torch.zeros(30)}, "target: expected int64"),
    ({"target": torch.full((30,), 3)}, "target: expected classes from 0 to 2, got 3 to 3"),
    ({"oscillation": 3}, "oscillation: expected an Oscillation"),
    ({"oscillation": Oscillation.from_function(lambda step: torch.ones(3), 3)}, "oscillation: expected one without"),
    ({"hidden": 0}, "hidden: expected an int >= 1"),
    ({"activation": "gelu"}, "activation: expected 'relu' or 'tanh'"),
    ({"lr": 0}, "lr: expected a number in"),
    ({"lr": []}, "lr: expected a number or one a member"),
    ({"lr": "fast"}, "lr: expected a number"),
    ({"momentum": 1.0}, "momentum: expected a number in"),
    ({"seeds": [1.5]}, "seed: expected an int"),
    ({"seeds": []}, "seeds: expected a sequence of ints"),
    ({"init": "he"}, "init: expected 'glorot-normal' or 'lecun-normal'"),
    ({"init": {"w1": torch.ones(2, 4)}}, "init: expected a dict of w1, b1, w2, b2"),
    ({"init": {name: torch.ones(3, 3) for name in ("w1", "b1", "w2", "b2")}}, "init\\['w1'\\]: expected floating"),
    ({"dtype": torch.float16}, "dtype: expected torch.float32 or torch.float64"),
    ({"device": "meta"}, "device: expected cpu or cuda"),
])  # fmt: skip
def test_bad_arguments_are_named(change, message):
    inputs, target = spirals()
    good = {"inputs": inputs, "target": target, "oscillation": Oscillation(3, 70, 10), "hidden": 4, "lr": 0.1}
    with pytest.raises((TypeError, ValueError, IndexError), match=message):
        PerceptronEnsemble(**(good | change))


def test_bad_arguments_of_methods_are_named():
    made = ensemble()
    for call, message in [
        (lambda: made.train(-1), "num_steps: expected an int >= 0"),
        (lambda: made.train(1, record_every=0), "record_every: expected an int >= 1"),
        (lambda: made.hvp(torch.ones(3)), "v: expected a tensor like the parameters"),
        (lambda: made.eigenvalues(0), "k: expected an int from 1"),
        (lambda: made.eigenvalues(2, max_basis=3), "max_basis: expected an int >= 4"),
        (lambda: made.eigenvalues(2, start=made.eigenvalues(2)), "start: expected a result of eigenvalues"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            call()
