"""The tangent kernel's eigenvalues against Jacobians built row by row."""

import pytest
import torch
from torch import nn

from dynloss_ext.ntk import ntk_eigenvalues


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3)).double()


@pytest.fixture
def inputs():
    return torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def jacobian_rows(model, inputs):
    """(N, C, P), one backward pass per entry."""
    params = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for sample in inputs:
        for value in model(sample.unsqueeze(0))[0]:
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, params, retain_graph=True)]))
    return torch.stack(rows).view(len(inputs), -1, rows[0].numel())


def test_mean_kernel(model, inputs):
    rows = jacobian_rows(model, inputs)
    kernel = sum(rows[:, c] @ rows[:, c].T for c in range(3)) / 3
    expected = torch.linalg.eigvalsh(kernel).flip(0)
    torch.testing.assert_close(ntk_eigenvalues(model, inputs, 5), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ntk_eigenvalues(model, inputs), expected[:1], rtol=1e-12, atol=1e-12)


def test_full_kernel(model, inputs):
    rows = jacobian_rows(model, inputs).flatten(0, 1)
    expected = torch.linalg.eigvalsh(rows @ rows.T).flip(0)
    values = ntk_eigenvalues(model, inputs, 15, outputs="full")
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)


def test_frozen_parameters_do_not_count(model, inputs):
    model[0].requires_grad_(False)
    rows = jacobian_rows(model, inputs).flatten(0, 1)
    expected = torch.linalg.eigvalsh(rows @ rows.T)[-1:]
    values = ntk_eigenvalues(model, inputs, outputs="full")
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)


def test_float32_model_gives_float64_values_and_is_left_alone(model, inputs):
    exact = ntk_eigenvalues(model, inputs, 2)
    model.float()
    values = ntk_eigenvalues(model, inputs.float(), 2)
    assert values.dtype == torch.float64
    torch.testing.assert_close(values, exact, rtol=1e-5, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training


def test_bad_arguments_are_named(model, inputs):
    for options, message in [
        ({"k": 6}, "k: got 6, expected 1 to 5"),
        ({"k": 0}, "k: got 0"),
        ({"k": 16, "outputs": "full"}, "k: got 16, expected 1 to 15"),
        ({"outputs": "sum"}, "outputs: got 'sum'"),
    ]:
        with pytest.raises(ValueError, match=message):
            ntk_eigenvalues(model, inputs, **options)
    with pytest.raises(ValueError, match="inputs"):
        ntk_eigenvalues(model, inputs[:0])
    with pytest.raises(ValueError, match="outputs have shape"):
        ntk_eigenvalues(nn.Sequential(model, nn.Flatten(0)), inputs)
    with pytest.raises(ValueError, match="requires grad"):
        ntk_eigenvalues(model.requires_grad_(False), inputs)


def test_batch_norm_and_dropout_need_eval_mode(inputs):
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout()).double()
    with pytest.raises(ValueError, match="BatchNorm1d in training mode"):
        ntk_eigenvalues(model, inputs)
    assert ntk_eigenvalues(model.eval(), inputs).shape == (1,)
