"""ModuleEnsemble: networks of any class side by side, each as if it were alone."""

import copy
import io

import pytest
import torch
from torch import nn

from dynloss_ext import (
    EigenTracker,
    ModuleEnsemble,
    Oscillation,
    Perceptron,
    PerceptronEnsemble,
    dynamic_cross_entropy,
    eigsh,
)
from dynloss_ext.ensemble import TrainingRecords, perceptron_values

CLASSES = 3
AMPLITUDES, PERIODS = [1.0, 8.0, 70.0], [10.0, 25.0, 40.0]
RATES, MOMENTA, DECAYS = [0.3, 0.1, 0.2], [0.0, 0.9, 0.5], [0.0, 1e-2, 1e-3]


def mlp():
    return nn.Sequential(nn.Linear(2, 7), nn.Tanh(), nn.Linear(7, CLASSES))


def convolutions():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(12, CLASSES),
    )


class Counting(nn.Module):
    """Replaces one buffer, writes to another, has a parameter that is not trained and one that is tied."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.second.weight = self.first.weight
        self.out = nn.Linear(2, CLASSES)
        self.scale = nn.Parameter(torch.rand(2), requires_grad=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, x):
        self.calls = self.calls + 1
        hidden = self.second(self.first(x).tanh()) * self.scale
        self.mean.mul_(0.9).add_(hidden.detach().mean(0))
        return self.out(hidden) + self.calls / 100


class Recurrent(nn.Module):
    """What vmap refuses."""

    def __init__(self):
        super().__init__()
        self.cells, self.out = nn.GRU(2, 4, batch_first=True), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.out(self.cells(x)[0][:, -1])


SHAPES = {mlp: (2,), convolutions: (1, 4, 4), Counting: (2,), Recurrent: (5, 2)}


def networks(make, members=3):
    torch.manual_seed(5)
    return [make().double() for _ in range(members)]


def batch(make, own=False, seed=0, members=3, samples=11):
    generator = torch.Generator().manual_seed(seed)
    lead = (members,) if own else ()
    inputs = torch.randn(*lead, samples, *SHAPES[make], generator=generator, dtype=torch.float64)
    return inputs, torch.randint(CLASSES, (*lead, samples), generator=generator)


def oscillations():
    return Oscillation(CLASSES, torch.tensor(AMPLITUDES), torch.tensor(PERIODS))


def ensemble(make=mlp, modules=None, **options):
    modules = networks(make) if modules is None else modules
    settings = {"lr": RATES, "momentum": MOMENTA, "weight_decay": DECAYS} | options
    return ModuleEnsemble(modules, settings.pop("oscillation", oscillations()), **settings)


def member_batch(pair, m, own):
    return tuple(x[m] for x in pair) if own else pair


def loss_of(m, network, inputs, target, step, **options):
    return dynamic_cross_entropy(
        network(inputs), target, Oscillation(CLASSES, AMPLITUDES[m], PERIODS[m]), step, **options
    )


def rows_alone(m, network, batches, own, *, nesterov=False, **options):
    """One network trained by torch.optim.SGD; its records, each by a forward that leaves the buffers as they were."""
    optimizer = torch.optim.SGD(
        network.parameters(), lr=RATES[m], momentum=MOMENTA[m], weight_decay=DECAYS[m], nesterov=nesterov
    )
    rows = []
    for step, pair in enumerate(batches):
        inputs, target = member_batch(pair, m, own)
        optimizer.zero_grad()
        loss_of(m, network, inputs, target, step, **options).backward()
        optimizer.step()
        seen = copy.deepcopy(network)
        with torch.no_grad():
            logits = seen(inputs)
        weighted = dynamic_cross_entropy(
            logits, target, Oscillation(CLASSES, AMPLITUDES[m], PERIODS[m]), step + 1, **options
        )
        plain = nn.functional.cross_entropy(
            logits, target, **{k: v for k, v in options.items() if k != "normalization"}
        )
        known = target != options.get("ignore_index", -100)
        rows.append([weighted, plain, (logits.argmax(1) == target)[known].double().mean()])
    return torch.tensor(rows, dtype=torch.float64)


def assert_trained_alike(made, records, alone, batches, own, **options):
    for m, network in enumerate(alone):
        expected = rows_alone(m, network, batches, own, **options)
        for column, value in zip((records.weighted_loss, records.loss, records.accuracy), expected.T, strict=True):
            torch.testing.assert_close(column[:, m], value, rtol=1e-8, atol=0)
        for name, x in network.named_parameters():
            torch.testing.assert_close(made.parameters[name][m], x.detach(), rtol=1e-8, atol=1e-10)
        for name, x in network.named_buffers():
            torch.testing.assert_close(made.buffers[name][m], x, rtol=1e-8, atol=1e-10)


# ---- one and the same network


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("make, vmap", [
    (mlp, True), (convolutions, True), (convolutions, False), (Counting, True), (Counting, False), (Recurrent, False)
])  # fmt: skip
def test_training_is_that_of_each_module_alone(make, vmap, own):
    alone = networks(make)
    made, pair = ensemble(make, vmap=vmap), batch(make, own)
    records = made.train(*pair, 25)
    assert made.step == 25 and records.step.tolist() == list(range(25))
    assert_trained_alike(made, records, alone, [pair] * 25, own)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("make", [mlp, convolutions])
def test_training_on_batches_is_that_of_each_module_alone(make, own):
    alone, batches = networks(make), [batch(make, own, seed) for seed in range(20)]
    made = ensemble(make)
    records = made.train_on(batches)
    assert_trained_alike(made, records, alone, batches, own)


def test_options_are_those_of_sgd_and_of_the_loss(monkeypatch):
    monkeypatch.setitem(globals(), "MOMENTA", [0.3, 0.9, 0.5])
    alone, pair = networks(mlp), batch(mlp)
    options = {"ignore_index": 1, "label_smoothing": 0.1}
    made = ensemble(nesterov=True, momentum=MOMENTA, **options)
    assert_trained_alike(made, made.train(*pair, 20), alone, [pair] * 20, False, nesterov=True, **options)
    weighted = ensemble(normalization="weights")
    loss, _ = weighted.gradient(*pair)
    expected = [loss_of(m, n, *pair, 0, normalization="weights").detach() for m, n in enumerate(networks(mlp))]
    torch.testing.assert_close(loss, torch.stack(expected))


def test_probabilities_and_several_inputs():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(2, CLASSES)

        def forward(self, x, y):
            return self.out(x * y)

    (inputs, target), own = batch(mlp), batch(mlp, own=True)[1]
    one_hot = nn.functional.one_hot(target, CLASSES).double()
    classes, probabilities, each = (ensemble(modules=networks(Product)) for _ in range(3))
    expected = classes.train((inputs, inputs), target, 10)
    records = probabilities.train((inputs, inputs), one_hot, 10)
    torch.testing.assert_close(records.weighted_loss, expected.weighted_loss)
    assert torch.equal(records.accuracy, expected.accuracy)
    one_hot_of_each = nn.functional.one_hot(target.expand(3, -1), CLASSES).double()
    every = (inputs.expand(3, -1, -1),) * 2
    torch.testing.assert_close(each.train(every, one_hot_of_each, 10).loss, expected.loss)
    assert each.train(every, own).loss.shape == (1, 3)


def test_perceptrons_are_those_of_the_compiled_ensemble():
    inputs, target = batch(mlp)
    oscillation = oscillations()
    compiled = PerceptronEnsemble(inputs, target, oscillation, hidden=6, lr=RATES, momentum=MOMENTA)
    modules = [Perceptron(*perceptron_values("glorot-normal", 2, 6, CLASSES, seed)) for seed in range(3)]
    made = ModuleEnsemble(modules, oscillation, lr=RATES, momentum=MOMENTA)
    expected, records = compiled.train(40, record_every=3), made.train(inputs, target, 40, record_every=3)
    assert torch.equal(records.step, expected.step)
    for name in ("weighted_loss", "loss", "accuracy"):
        torch.testing.assert_close(getattr(records, name), getattr(expected, name), rtol=1e-9, atol=0)
    v = torch.randn(3, made.num_parameters, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(made.gradient(inputs, target), compiled.gradient(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(made.hvp(v, inputs, target), compiled.hvp(v), rtol=1e-9, atol=1e-11)


# ---- curvature


def dense_hessian(network, loss):
    names, values = zip(*((n, p.detach()) for n, p in network.named_parameters() if p.requires_grad), strict=True)
    buffers = {name: b.clone() for name, b in network.named_buffers()}

    def of_flat(flat):
        parts = torch.split(flat, [v.numel() for v in values])
        own = {name: part.view_as(v) for name, part, v in zip(names, parts, values, strict=True)}
        return loss(
            lambda x: torch.func.functional_call(network, own | {n: b.clone() for n, b in buffers.items()}, (x,))
        )

    return torch.autograd.functional.hessian(of_flat, torch.cat([v.reshape(-1) for v in values]))


@pytest.mark.parametrize("make, vmap, own", [(mlp, True, True), (convolutions, True, False), (Counting, False, False)])
def test_gradient_product_and_eigenvalues_are_those_of_dense_hessians(make, vmap, own):
    made, pair = ensemble(make, vmap=vmap), batch(make, own)
    made.train(*pair, 9)
    before = {name: b.clone() for name, b in made.buffers.items()}
    loss, gradient = made.gradient(*pair)
    v = torch.randn(3, made.num_parameters, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    products = made.hvp(v, *pair)
    found = made.eigenvalues(3, *pair, tol=1e-8, vectors=True)
    tracker = EigenTracker(3, tol=1e-8)
    for m in range(3):
        network = made.member(m)
        inputs, target = member_batch(pair, m, own)
        value = loss_of(m, network, inputs, target, 9)
        trained = [p for p in network.parameters() if p.requires_grad]
        expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, trained)])
        torch.testing.assert_close(loss[m], value.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient[m], expected, rtol=1e-10, atol=1e-13)
        network = made.member(m)
        dense = dense_hessian(network, lambda call: loss_of(m, call, inputs, target, 9))  # noqa: B023
        torch.testing.assert_close(products[m], dense @ v[m], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(made.hessian(m, *pair).to_dense(), dense, rtol=1e-9, atol=1e-11)
        values = torch.linalg.eigvalsh(dense).flip(0)[:3]
        torch.testing.assert_close(found.values[m], values, rtol=1e-7, atol=1e-9)
        vectors = found.vectors[m]
        residuals = (dense @ vectors - vectors * found.values[m]).norm(dim=0)
        torch.testing.assert_close(found.residuals[m], residuals, rtol=1e-2, atol=1e-10)
        torch.testing.assert_close(eigsh(made.hessian(m, *pair), 3, tol=1e-8).values, values, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(tracker.update(made.hessian(m, *pair)).values, values, rtol=1e-7, atol=1e-9)
    assert bool(found.converged.all())
    assert all(torch.equal(made.buffers[name], b) for name, b in before.items())
    again = made.eigenvalues(3, *pair, start=found, audit=False)
    assert bool((again.num_hvp < found.num_hvp).all()) and again.vectors is None


def test_an_operator_is_of_its_step():
    made, pair = ensemble(), batch(mlp)
    v = torch.ones(made.num_parameters, dtype=torch.float64)
    operator = made.hessian(1, *pair)
    made.train(*pair)
    with pytest.raises(RuntimeError, match="changed"):
        operator @ v
    operator = made.hessian(1, *pair)
    made.parameters["2.bias"][1, 0] += 1
    with pytest.raises(RuntimeError, match="changed"):
        eigsh(operator, 1)


# ---- members that are not finite


@pytest.mark.parametrize("vmap", [True, False])
def test_a_member_that_is_not_finite_keeps_what_it_had(vmap):
    pair = batch(convolutions)
    options = {"momentum": MOMENTA, "vmap": vmap}
    made = ensemble(convolutions, lr=[0.3, 1e200, 0.2], **options)
    alone = ensemble(convolutions, lr=[0.3, 0.1, 0.2], **options)
    first = made.train(*pair)
    before = made.state_dict()
    records, expected = made.train(*pair, 19), alone.train(*pair, 20)
    assert bool(first.step.tolist() == [0]) and made.finite.tolist() == [True, False, True]
    last = copy.deepcopy(made.state_dict())
    made.train(*pair, 5)
    now = made.state_dict()
    for name in ("parameters", "velocity"):
        assert torch.equal(now[name][1], last[name][1]) and bool(now[name].isfinite().all())
        assert not torch.equal(now[name][0], last[name][0])
    for name, buffer in now["buffers"].items():
        assert torch.equal(buffer[1], last["buffers"][name][1]) and not torch.equal(buffer[0], last["buffers"][name][0])
    assert torch.equal(records.loss[:, [0, 2]], expected.loss[1:, [0, 2]])
    assert bool(records.loss[-1].isnan().tolist() == [False, True, False])
    assert before["step"] == 1
    loss, gradient = made.gradient(*pair)
    products = made.hvp(torch.ones_like(gradient), *pair)
    values = made.eigenvalues(2, *pair).values
    for x in (loss, gradient, products, values):
        assert bool(x[1].isnan().all()) and bool(x[[0, 2]].isfinite().all())
    assert bool((made.hessian(1, *pair) @ torch.ones(made.num_parameters, dtype=torch.float64)).isnan().all())


def test_a_step_that_would_not_be_finite_leaves_no_trace():
    pair = batch(convolutions)
    made = ensemble(convolutions, lr=[0.3, 1e308, 0.2], momentum=0.5, weight_decay=[0.0, 1e300, 0.0])
    before = made.state_dict()
    records = made.train(*pair)
    after = made.state_dict()
    assert made.finite.tolist() == [True, False, True]
    assert records.weighted_loss[0].isnan().tolist() == [False, True, False]
    pairs = [(before[name], after[name]) for name in ("parameters", "velocity")]
    pairs += [(before["buffers"][name], buffer) for name, buffer in after["buffers"].items()]
    for old, new in pairs:
        assert torch.equal(old[1], new[1]) and not torch.equal(old[0], new[0])


def test_a_member_that_was_not_finite_once_is_trained_no_more():
    inputs, target = batch(mlp, own=True)
    bad = inputs.clone()
    bad[1, 0, 0] = torch.nan
    made = ensemble()
    before = made.parameters["0.weight"][1].clone()
    records = made.train_on([(bad, target), (inputs, target)])
    assert made.finite.tolist() == [True, False, True] and bool(records.loss[:, 1].isnan().all())
    assert torch.equal(made.parameters["0.weight"][1], before)


# ---- records, states, modes


def test_records_in_parts_and_none():
    made, whole, pair = ensemble(convolutions), ensemble(convolutions), batch(convolutions)
    parts = [made.train(*pair, steps, record_every=4) for steps in (0, 1, 1, 1, 1, 9)]  # three of them without a row
    expected = whole.train(*pair, 13, record_every=4)
    assert torch.cat([part.step for part in parts]).tolist() == expected.step.tolist() == [0, 4, 8, 12]
    for name in ("weighted_loss", "loss", "accuracy"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(expected, name))
    assert isinstance(parts[0], TrainingRecords) and parts[0].loss.shape == (0, 3)
    assert made.train_on([]).loss.shape == (0, 3)


def test_a_state_goes_on_bit_for_bit():
    pair = batch(Counting)
    made, other = ensemble(Counting), ensemble(Counting, modules=networks(Counting)[::-1])
    made.train(*pair, 11)
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    expected, records = made.train(*pair, 13), other.train(*pair, 13)
    assert other.step == 24 and torch.equal(records.weighted_loss, expected.weighted_loss)
    for name, x in (made.parameters | made.buffers).items():
        assert torch.equal((other.parameters | other.buffers)[name], x)
    state = made.state_dict()
    for changed, message in [
        ({"lr": 0.1}, r"expected lr\[0\] = "),
        ({"weight_decay": 0.5}, r"expected weight_decay\[0\] = "),
        ({"label_smoothing": 0.5}, "expected label_smoothing = "),
        ({"oscillation": Oscillation(CLASSES, 5, 10)}, "expected amplitude = "),
        ({"modules": networks(mlp)}, r"expected parameters\['0.weight'\] = "),
    ]:
        with pytest.raises(ValueError, match=f"state: expected one of an ensemble like this, got another: {message}"):
            ensemble(**({"make": Counting} | changed)).load_state_dict(state)
    with pytest.raises(ValueError, match="state: expected the entries"):
        made.load_state_dict({"step": 3})
    with pytest.raises(TypeError, match="state: expected a dict"):
        made.load_state_dict(3)


def test_the_mode_is_that_of_the_modules():
    pair = batch(convolutions)
    made = ensemble(convolutions)
    made.train(*pair, 3)
    train_loss, _ = made.gradient(*pair)
    made.module.eval()
    before = {name: b.clone() for name, b in made.buffers.items()}
    eval_loss, _ = made.gradient(*pair)
    network = made.member(2)
    assert not network.training and not torch.equal(train_loss, eval_loss)
    torch.testing.assert_close(eval_loss[2], loss_of(2, network, *pair, 3).detach())
    made.train(*pair)
    assert all(torch.equal(made.buffers[name], b) for name, b in before.items())


@pytest.mark.parametrize("vmap", [True, False])
def test_dropout_is_drawn_for_each_member_and_records_draw_nothing(vmap):
    def make():
        return nn.Sequential(nn.Linear(2, 40), nn.Dropout(0.5), nn.Linear(40, CLASSES))

    pair = batch(mlp)
    same = [networks(make, 1)[0]] * 2
    made, whole = (
        ensemble(
            modules=same, oscillation=Oscillation(CLASSES, 5, 10), lr=0.1, momentum=0.0, weight_decay=0.0, vmap=vmap
        )
        for _ in range(2)
    )
    torch.manual_seed(3)
    parts = [made.train(*pair, steps) for steps in (2, 3)]
    torch.manual_seed(3)
    expected = whole.train(*pair, 5)
    assert torch.equal(torch.cat([part.loss for part in parts]), expected.loss)
    assert not torch.equal(expected.loss[:, 0], expected.loss[:, 1])
    with pytest.raises(ValueError, match="switch dropout"):
        made.hessian(0, *pair)
    made.module.eval()
    assert made.eigenvalues(1, *pair).values.shape == (2, 1)


# ---- members and their number


def test_the_number_of_members_follows_from_any_argument():
    pair, one, network = batch(mlp), Oscillation(CLASSES, 70, 10), networks(mlp, 1)[0]
    assert ModuleEnsemble(network, one, lr=0.1).num_members == 1
    for modules, more in [
        (network, {"oscillation": Oscillation(CLASSES, torch.ones(5), 10)}),
        (network, {"lr": [0.1] * 5}),
        (network, {"momentum": torch.full((5,), 0.5)}),
        (network, {"weight_decay": [0.1] * 5}),
        ([network] * 5, {}),
        (nn.ModuleList(networks(mlp, 5)), {}),
    ]:
        made = ModuleEnsemble(modules, **({"oscillation": one, "lr": 0.1} | more))
        assert made.num_members == 5 and made.train(*pair).loss.shape == (1, 5)
    with pytest.raises(ValueError, match="lr: expected one or 3, as many as modules has, got 2"):
        ModuleEnsemble(networks(mlp), one, lr=[0.1, 0.2])


def test_a_member_is_a_copy():
    modules = networks(convolutions)
    made, pair = ensemble(convolutions, modules=modules), batch(convolutions)
    state = copy.deepcopy(modules[1].state_dict())
    made.train(*pair)
    assert all(torch.equal(x, state[name]) for name, x in modules[1].state_dict().items())
    network = made.member(-1)
    before = made.parameters["0.weight"].clone()
    with torch.no_grad():
        network[0].weight.zero_()
    assert isinstance(network, nn.Sequential) and torch.equal(made.parameters["0.weight"], before)
    with pytest.raises(IndexError, match="member: expected one of 3, got 3"):
        made.member(3)
    with pytest.raises(TypeError, match="member: expected an int"):
        made.hessian(1.0, *pair)
    assert "members=3, module=Sequential" in repr(made)


def test_single_precision():
    made, pair = ensemble(modules=[n.float() for n in networks(mlp)]), batch(mlp)
    exact = ensemble()
    records, expected = made.train(pair[0].float(), pair[1], 10), exact.train(*pair, 10)
    assert records.loss.dtype == torch.float64 and made.parameters["0.weight"].dtype == torch.float32
    torch.testing.assert_close(records.loss, expected.loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("change, message", [
    ({"modules": []}, "modules: expected a network or one a member, got none"),
    ({"modules": [3]}, "modules: expected an nn.Module or a sequence of them, got int"),
    ({"modules": "many"}, "modules: expected an nn.Module or a sequence of them, got str"),
    ({"modules": [nn.Linear(2, 3), nn.Linear(2, 4)]}, r"modules\[1\]: expected the structure of modules\[0\]"),
    ({"modules": [nn.Linear(2, 3), nn.Linear(2, 3).double()]}, "expected weight = 'float32"),
    ({"modules": [nn.Linear(2, 3), nn.Linear(2, 3).eval()]}, "expected mode of the network = 'train', got 'eval'"),
    ({"modules": [nn.Sequential(nn.Linear(2, 3), nn.ReLU()), nn.Sequential(nn.Linear(2, 3), nn.Tanh())]}, "ReLU"),
    ({"modules": nn.ReLU()}, "modules: expected at least one tensor"),
    ({"modules": nn.Linear(2, 3).half()}, "weight: expected float32 or float64"),
    ({"modules": nn.LazyLinear(3)}, "modules: expected initialised parameters, got lazy ones"),
    ({"oscillation": 3}, "oscillation: expected an Oscillation"),
    ({"oscillation": Oscillation.from_function(lambda step: torch.ones(3), 3)}, "oscillation: expected one without"),
    ({"lr": 0}, "lr: expected a number in"),
    ({"momentum": 1.0}, "momentum: expected a number in"),
    ({"weight_decay": -1}, "weight_decay: expected a number in"),
    ({"nesterov": True}, "nesterov: expected False where there is no momentum"),
    ({"nesterov": 1}, "nesterov: expected a bool"),
    ({"vmap": None}, "vmap: expected a bool"),
    ({"label_smoothing": 2}, "label_smoothing: expected a number in"),
    ({"normalization": "rows"}, "normalization: expected 'samples' or 'weights'"),
])  # fmt: skip
def test_bad_arguments_are_named(change, message):
    good = {"modules": nn.Linear(2, 3), "oscillation": Oscillation(CLASSES, 70, 10), "lr": 0.1}
    with pytest.raises((TypeError, ValueError), match=message):
        ModuleEnsemble(**(good | change))


def test_bad_arguments_of_methods_are_named():
    made, (inputs, target) = ensemble(), batch(mlp)
    for call, message in [
        (lambda: made.train(inputs, target, -1), "num_steps: expected an int >= 0"),
        (lambda: made.train(inputs, target, record_every=0), "record_every: expected an int >= 1"),
        (lambda: made.train(3, target), "inputs: expected a torch.Tensor"),
        (lambda: made.train(inputs, 3), "target: expected a torch.Tensor"),
        (lambda: made.train(inputs, target.expand(2, -1)), r"target: expected classes \(N,\) or \(3, N\)"),
        (lambda: made.train(inputs, target.expand(3, -1)), "inputs: expected 3 in front"),
        (lambda: made.train(inputs, target[:-1]), "target: expected"),
        (lambda: made.hvp(torch.ones(3), inputs, target), "v: expected a tensor like the parameters"),
        (lambda: made.eigenvalues(0, inputs, target), "k: expected an int from 1"),
        (lambda: made.eigenvalues(2, inputs, target, max_basis=3), "max_basis: expected an int >= 4"),
        (
            lambda: made.eigenvalues(2, inputs, target, start=made.eigenvalues(2, inputs, target)),
            "start: expected a result of eigenvalues",
        ),
        (lambda: ensemble(modules=nn.LSTM(2, 3).double()).train(inputs, target), "vmap=False"),
        (
            lambda: ensemble(modules=nn.LSTM(2, 3).double(), vmap=False).train(inputs, target),
            r"modules: expected logits \(N, C\) from the forward, got tuple",
        ),
    ]:
        with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
            call()
    assert made.step == 0


def test_a_forward_that_vmap_refuses_is_told_what_to_do():
    made = ensemble(Recurrent)
    with pytest.raises(RuntimeError, match=r"modules: expected a forward that torch.func.vmap can batch, .*vmap=False"):
        made.train(*batch(Recurrent))
