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
    for options, error, message in [
        ({"k": 6}, ValueError, "k: expected an int from 1 to 5, the size of the kernel, got 6"),
        ({"k": 0}, ValueError, "k: expected an int from 1 to 5, .* got 0"),
        ({"k": 1.5}, TypeError, "k: expected an int, got float"),
        ({"k": 16, "outputs": "full"}, ValueError, "k: expected an int from 1 to 15, .* got 16"),
        ({"outputs": "sum"}, ValueError, "outputs: expected 'mean' or 'full', got 'sum'"),
    ]:
        with pytest.raises(error, match=message):
            ntk_eigenvalues(model, inputs, **options)
    with pytest.raises(ValueError, match=r"inputs: expected at least one sample, .* got shape \(0, 4\)"):
        ntk_eigenvalues(model, inputs[:0])
    with pytest.raises(TypeError, match=r"inputs: expected a torch\.Tensor, got list"):
        ntk_eigenvalues(model, inputs.tolist())
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got function"):
        ntk_eigenvalues(lambda x: x, inputs)
    with pytest.raises(ValueError, match=r"output of model: expected shape \(5, C\), got \(15,\)"):
        ntk_eigenvalues(nn.Sequential(model, nn.Flatten(0)), inputs)
    with pytest.raises(TypeError, match=r"output of model: expected a torch\.Tensor, got tuple"):
        ntk_eigenvalues(Then(model, lambda x: (x, x)), inputs)
    with pytest.raises(ValueError, match="model: expected a parameter that requires grad, got none"):
        ntk_eigenvalues(model.requires_grad_(False), inputs)


class Then(nn.Module):
    """A model and a function of its outputs."""

    def __init__(self, model, function):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, x):
        return self.function(self.model(x))


def test_batch_norm_and_dropout_need_eval_mode(inputs):
    for layer in (nn.BatchNorm1d(3), nn.Dropout()):
        model = nn.Sequential(nn.Linear(4, 3), layer).double()
        with pytest.raises(ValueError, match=f"model: expected .*, got .* 1 is a {type(layer).__name__} in training"):
            ntk_eigenvalues(model, inputs)
        assert ntk_eigenvalues(model.eval(), inputs).shape == (1,)


def test_batch_norm_without_running_statistics_is_refused_in_any_mode(inputs):
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)).double()
    for mode in (True, False):
        with pytest.raises(ValueError, match=r"model: expected .* got .* 1 is a BatchNorm1d"):
            ntk_eigenvalues(model.train(mode), inputs)


def test_instance_norm_is_refused_only_where_it_updates_its_statistics():
    images = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for track in (True, False):
        norm = nn.InstanceNorm2d(2, affine=True, track_running_stats=track)
        model = nn.Sequential(norm, nn.Flatten(), nn.Linear(32, 2)).double()
        if track:
            with pytest.raises(ValueError, match=r"model: expected .* got .* 0 is a InstanceNorm2d in training mode"):
                ntk_eigenvalues(model, images)
            assert norm.num_batches_tracked == 0
            model.eval()
        expected = torch.linalg.eigvalsh(kernel := sum(r @ r.T for r in jacobian_rows(model, images).unbind(1)) / 2)
        torch.testing.assert_close(ntk_eigenvalues(model, images, len(kernel)), expected.flip(0))


def test_random_models_are_refused(model, inputs):
    for function in (nn.functional.dropout, lambda x: x + torch.randn(3, dtype=x.dtype)):
        with pytest.raises(ValueError, match="model: expected no randomness, got"):
            ntk_eigenvalues(Then(model, function), inputs)


def test_gradients_that_are_not_finite_are_an_error(model, inputs):
    with pytest.raises(RuntimeError, match="model: expected finite gradients, got one that is not"):
        ntk_eigenvalues(model, inputs * torch.nan)


def test_half_precision_loses_nothing_after_the_gradients(inputs):
    # The gradient of a linear layer is its input and 1, exactly.
    inputs = inputs.bfloat16()
    rows = torch.cat([inputs.double(), torch.ones(5, 1, dtype=torch.float64)], 1)
    expected = torch.linalg.eigvalsh(rows @ rows.T).flip(0)
    values = ntk_eigenvalues(nn.Linear(4, 3).bfloat16(), inputs, 5)
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)


class Counting(nn.Module):
    """Counts its calls."""

    def __init__(self, inplace):
        super().__init__()
        self.inplace = inplace
        self.linear = nn.Linear(4, 3).double()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.inplace:
            self.calls += 1
        else:
            self.calls = self.calls + 1
        return self.linear(x)


@pytest.mark.parametrize("inplace", [True, False])
def test_buffers_stay_as_they_were(inputs, inplace):
    model = Counting(inplace)
    calls = model.calls
    values = ntk_eigenvalues(model, inputs, 2)
    assert model.calls is calls
    assert calls == 0
    torch.testing.assert_close(values, ntk_eigenvalues(model.linear, inputs, 2))
    normed = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3).double()).train()
    before = {name: buffer.clone() for name, buffer in normed.named_buffers()}
    ntk_eigenvalues(normed, inputs)
    assert all(torch.equal(buffer, before[name]) for name, buffer in normed.named_buffers())


def test_the_random_state_stays_as_it_was(inputs):
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x) + torch.randn(3, dtype=x.dtype)

    model = Noisy(4, 3).double()
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="model: expected no randomness, got"):
        ntk_eigenvalues(model, inputs)
    assert torch.equal(torch.get_rng_state(), state)


def test_samples_that_the_model_couples_by_itself_are_refused(inputs):
    class Centred(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return y - y.mean(0)

    with pytest.raises(ValueError, match=r"model: expected .* got outputs for one sample alone that differ"):
        ntk_eigenvalues(Centred(4, 3).double(), inputs)


def test_dropout_of_nothing_is_not_random(model, inputs):
    with_dropout = nn.Sequential(model, nn.Dropout(0.0)).train()
    torch.testing.assert_close(ntk_eigenvalues(with_dropout, inputs), ntk_eigenvalues(model, inputs))


# ---- models that vmap refuses


class Recurrent(nn.Module):
    """The last output of a recurrent layer, and a linear one."""

    def __init__(self, kind, **options):
        super().__init__()
        self.layer = getattr(nn, kind)(3, 5, batch_first=True, **options)
        self.linear = nn.Linear(10 if options.get("bidirectional") else 5, 2)

    def forward(self, x):
        return self.linear(self.layer(x)[0][:, -1])


class Averaging(nn.Module):
    """Keeps a running mean in place, also in eval mode, and adds up its inputs in place."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        self.mean.mul_(0.9).add_(x.detach().mean((0, 1)), alpha=0.1)
        total = torch.zeros(len(x), 3, dtype=x.dtype)
        for t in range(x.shape[1]):
            total += x[:, t]
        return torch.tanh(self.linear(total))


class Branching(nn.Module):
    """Takes a branch that depends on the numbers; a parameter is without use in the other."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        return torch.cat([(self.first if float(row.sum()) > 0 else self.second)(row[:1]) for row in x])


@pytest.mark.parametrize("outputs", ["mean", "full"])
@pytest.mark.parametrize(
    "build",
    [
        lambda: Recurrent("RNN"),
        lambda: Recurrent("GRU"),
        lambda: Recurrent("LSTM"),
        lambda: Recurrent("LSTM", num_layers=2, bidirectional=True),
        Averaging,
        Branching,
    ],
    ids=["RNN", "GRU", "LSTM", "bidirectional", "buffer", "branches"],
)
def test_models_that_vmap_refuses(build, outputs):
    torch.manual_seed(2)
    model, sequences = build().double().eval(), torch.randn(6, 4, 3, dtype=torch.float64)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with pytest.raises(RuntimeError):
        torch.func.vmap(lambda x: model(x.unsqueeze(0)))(sequences)
    model.load_state_dict(buffers, strict=False)
    found = ntk_eigenvalues(model, sequences, 6, outputs=outputs)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(ntk_eigenvalues(model, sequences, 6, outputs=outputs), found)
    parameters, rows = list(model.parameters()), []
    for sample in sequences:
        for value in model(sample.unsqueeze(0))[0]:
            of_each = torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True)
            rows.append(torch.cat([g.flatten() for g in of_each]))
    jacobian = torch.stack(rows).view(6, 2, -1)
    flat = jacobian.flatten(1 if outputs == "mean" else 0, -1 if outputs == "mean" else 1)
    kernel = flat @ flat.T / (2 if outputs == "mean" else 1)
    torch.testing.assert_close(found, torch.linalg.eigvalsh(kernel).flip(0)[:6], rtol=1e-12, atol=1e-12)


def test_frozen_parameters_and_coupled_samples_of_models_that_vmap_refuses(inputs):
    model = Recurrent("GRU").double()
    sequences = inputs.view(5, 1, 4)[:, :, :3]
    model.layer.requires_grad_(False)
    features = model.layer(sequences)[0][:, -1].detach()
    features = torch.cat([features, torch.ones(5, 1, dtype=torch.float64)], 1)
    largest = torch.linalg.eigvalsh(features @ features.T)[-1:]
    torch.testing.assert_close(ntk_eigenvalues(model, sequences), largest, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"model: expected .* got .* layer is a LSTM in training mode"):
        ntk_eigenvalues(Recurrent("LSTM", num_layers=2, dropout=0.5).double(), sequences)
    with pytest.raises(ValueError, match=r"model: expected .* got outputs for one sample alone that differ"):
        ntk_eigenvalues(Then(model, lambda y: y - y.mean(0)), sequences)
