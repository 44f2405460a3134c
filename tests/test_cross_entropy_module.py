"""The module of the loss: its state, copies, eval mode and step."""

import copy
import io
import pickle
import re

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint
import torch.nn.functional as F
from cross_entropy_cases import close, labels, normal
from torch import nn
from training_cases import OSCILLATION, expected_losses, model, train

from dynloss_ext import DynamicCrossEntropyLoss, Oscillation, dynamic_cross_entropy, loss_and_gradient, reference


@pytest.mark.parametrize(
    "options", [{}, {"normalization": "weights", "label_smoothing": 0.1}, {"inplace_gradient": True}]
)
def test_training_follows_the_twin_step_by_step(options):
    criterion = DynamicCrossEntropyLoss(OSCILLATION, **options)
    twin = {k: v for k, v in options.items() if k != "inplace_gradient"}
    close(train(criterion, 25), expected_losses(25, **twin), 1e-10)
    assert criterion.current_step == 25


def test_state_dict_resumes_at_the_step():
    whole = train(DynamicCrossEntropyLoss(OSCILLATION), 12)
    criterion, network = DynamicCrossEntropyLoss(OSCILLATION), model()
    first = train(criterion, 5, network)
    saved = io.BytesIO()
    torch.save(criterion.state_dict(), saved)
    saved.seek(0)
    resumed = DynamicCrossEntropyLoss(OSCILLATION)
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    assert resumed.current_step == 5
    close(torch.cat([first, train(resumed, 7, network)]), whole)


OTHERS = {
    "amplitude": (Oscillation(4, 10, 10), {}),
    "period": (Oscillation(4, 9, 11), {}),
    "waveform": (Oscillation(4, 9, 10, waveform="sine"), {}),
    "closed": (Oscillation(4, 9, 10, closed=True), {}),
    "order": (Oscillation(4, 9, 10, class_order=[1, 0, 2, 3]), {}),
    "start": (Oscillation(4, 9, 10, start_step=1), {}),
    "stop": (Oscillation(4, 9, 10, stop_step=9), {}),
    "table": (Oscillation.from_table(torch.ones(2, 4)), {}),
    "ensemble": (Oscillation(4, torch.tensor([9.0]), 10), {}),
    "reduction": (Oscillation(4, 9, 10), {"reduction": "sum"}),
    "normalization": (Oscillation(4, 9, 10), {"normalization": "weights"}),
    "ignore_index": (Oscillation(4, 9, 10), {"ignore_index": 1}),
    "label_smoothing": (Oscillation(4, 9, 10), {"label_smoothing": 0.1}),
}


@pytest.mark.parametrize("other", OTHERS)
def test_state_of_another_configuration_is_an_unexpected_key(other):
    oscillation, options = OTHERS[other]
    saved = DynamicCrossEntropyLoss(oscillation, **options)
    saved.set_step(17)
    state, loss = nn.Sequential(saved).state_dict(), nn.Sequential(DynamicCrossEntropyLoss(Oscillation(4, 9, 10)))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*0\._extra_state: expected \w+ = .*, got") as refusal:
        loss.load_state_dict(state)
    name = {"order": "class_order", "start": "start_step", "stop": "stop_step", "ensemble": "amplitude"}.get(
        other, other
    )
    assert f"expected {name} = " in str(refusal.value)
    with pytest.raises(ValueError, match=f"state_dict: expected .*{name} = "):
        loss[0].set_extra_state(state["0._extra_state"])
    missing, unexpected = loss.load_state_dict(state, strict=False)
    assert not missing and len(unexpected) == 1
    assert loss[0].current_step == 17 and loss[0].oscillation == Oscillation(4, 9, 10)
    nn.Sequential(DynamicCrossEntropyLoss(oscillation, **options)).load_state_dict(state)


def test_a_difference_is_named_in_a_few_words():
    for shape in ((500, 100), (2, 300, 10)):
        table = torch.rand(shape, dtype=torch.float64)
        state = DynamicCrossEntropyLoss(Oscillation.from_table(table)).state_dict()
        assert state["_extra_state"].numel() < 8 * table.numel() + 2000
        table.view(-1)[-3] = 7
        other = DynamicCrossEntropyLoss(Oscillation.from_table(table), label_smoothing=0.1)
        first = [*(n - 1 for n in shape[:-1]), shape[-1] - 3]
        with pytest.raises(RuntimeError, match=re.escape(f"expected table{first} = 7.0, got 0.")) as refusal:
            other.load_state_dict(state)
        assert "expected label_smoothing = 0.1, got 0.0" in str(refusal.value)
        everything = DynamicCrossEntropyLoss(
            Oscillation(70, torch.rand(99) + 1, 7, waveform="sine", class_order=range(70)[::-1], stop_step=2**52),
            **{"reduction": "sum", "normalization": "weights", "ignore_index": 2**61},
        )
        with pytest.raises(RuntimeError, match=r"_extra_state: expected num_classes = 70, got .*\.\.\.") as refusal:
            everything.load_state_dict(state)
        assert len(str(refusal.value)) < 500


@pytest.mark.parametrize(
    ("oscillation", "stored"),
    [
        (OSCILLATION, {"class_order": [2, 0, 3, 1], "stop_step": 500}),
        (Oscillation(4, torch.tensor([9.0, 2.5]), 10), {"amplitude": [9.0, 2.5], "period": [10.0, 10.0]}),
        (
            Oscillation.from_table(torch.tensor([[1.0, 0.1, 2.0, 0.25], [0.0, 3.0, 0.5, 1.0]], dtype=torch.float64)),
            {"amplitude": 1.0, "period": 2.0, "waveform": "table"}
            | {"table": [[1.0, 0.1, 2.0, 0.25], [0.0, 3.0, 0.5, 1.0]]},
        ),
    ],
)
def test_states_of_version_0_1_0_are_read(oscillation, stored):
    description = {"num_classes": 4, "amplitude": 9.0, "period": 10.0, "waveform": "triangle", "class_order": None}
    description |= {"closed": False, "start_step": 0, "stop_step": None, "table": None}
    options = {"reduction": "mean", "normalization": "samples", "ignore_index": -100, "label_smoothing": 0.1}
    state = {"current_step": torch.tensor(12), "_extra_state": {"oscillation": description | stored, **options}}
    criterion = DynamicCrossEntropyLoss(oscillation, label_smoothing=0.1)
    criterion.load_state_dict(state)
    assert criterion.current_step == 12
    with pytest.raises(RuntimeError, match=r"expected label_smoothing = 0\.0, got 0\.1"):
        DynamicCrossEntropyLoss(oscillation).load_state_dict(state)


def test_incomplete_and_damaged_states_are_refused():
    with torch.device("meta"):  # where models are made before they are loaded
        packed = DynamicCrossEntropyLoss(OSCILLATION).get_extra_state()
    state = DynamicCrossEntropyLoss(OSCILLATION).state_dict()
    assert torch.equal(packed, state["_extra_state"])
    assert set(state) == {"current_step", "_extra_state"}
    for key in state:
        with pytest.raises(RuntimeError, match=key):
            DynamicCrossEntropyLoss(OSCILLATION).load_state_dict({k: v for k, v in state.items() if k != key})
    for damaged in (None, {}, packed[:-1], packed[:20], packed.float(), torch.zeros(3, dtype=torch.uint8), packed[1:]):
        for strict in (True, False):
            with pytest.raises(ValueError, match="state_dict: expected the configuration of a loss, got"):
                DynamicCrossEntropyLoss(OSCILLATION).load_state_dict({**state, "_extra_state": damaged}, strict=strict)


@pytest.mark.filterwarnings("ignore")  # there is no process group
def test_distributed_checkpoints_hold_the_state(tmp_path):
    saved = DynamicCrossEntropyLoss(Oscillation(4, 9, 10))
    saved.set_step(7)
    torch.distributed.checkpoint.save(saved.state_dict(), checkpoint_id=tmp_path)
    for amplitude, unexpected in ((9, []), (10.25, ["_extra_state: expected amplitude = 10.25, got 9.0"])):
        criterion = DynamicCrossEntropyLoss(Oscillation(4, amplitude, 10))
        state = criterion.state_dict()
        torch.distributed.checkpoint.load(state, checkpoint_id=tmp_path)
        assert criterion.load_state_dict(state, strict=False) == ([], unexpected)
        assert criterion.current_step == 7


def test_safetensors_hold_the_state(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    module = nn.Sequential(model(), DynamicCrossEntropyLoss(OSCILLATION))
    module[1].set_step(7)
    safetensors.save_model(module, tmp_path / "state")
    same = nn.Sequential(model(1), DynamicCrossEntropyLoss(OSCILLATION))
    assert safetensors.load_model(same, tmp_path / "state") == (set(), [])
    assert same[1].current_step == 7
    other = nn.Sequential(model(1), DynamicCrossEntropyLoss(Oscillation(4, 9, 10)))
    with pytest.raises(RuntimeError, match=r"expected class_order = None, got \[2\.0, 0\.0, 3\.0, 1\.0\]"):
        safetensors.load_model(other, tmp_path / "state")


def test_copies_pickles_and_casts_keep_step_and_oscillation():
    criterion = DynamicCrossEntropyLoss(OSCILLATION)
    criterion.current_step.fill_(2**53 - 5)
    whole = io.BytesIO()
    torch.save(criterion, whole)
    whole.seek(0)
    for twin in (
        copy.deepcopy(criterion),
        copy.copy(criterion),
        pickle.loads(pickle.dumps(criterion)),
        torch.load(whole, weights_only=False),
        copy.deepcopy(criterion).half().double().to(torch.bfloat16),
        nn.Sequential(copy.deepcopy(criterion)).float()[0],
    ):
        assert twin.current_step == 2**53 - 5
        assert twin.current_step.dtype == torch.int64
        assert twin.oscillation == criterion.oscillation
    twin = copy.deepcopy(criterion)
    twin.step()
    assert criterion.current_step == 2**53 - 5
    assert "Oscillation(num_classes=4" in repr(criterion)
    assert "ignore_index=-100, label_smoothing=0.0, weight=None" in repr(criterion)
    other = DynamicCrossEntropyLoss(OSCILLATION, weight=torch.ones(4), ignore_index=-1, label_smoothing=0.1)
    assert "ignore_index=-1, label_smoothing=0.1, weight=tensor of shape (4,)" in repr(other)


def test_eval_does_not_change_the_weights():
    criterion = DynamicCrossEntropyLoss(OSCILLATION)
    criterion.current_step.fill_(5)
    x, y = normal(6, 4), labels(4, 6)
    assert torch.equal(criterion.train()(x, y), criterion.eval()(x, y))


@pytest.mark.parametrize("options", [{}, {"normalization": "weights", "ignore_index": 2}, {"label_smoothing": 0.1}])
@pytest.mark.parametrize("inplace", [False, True])
def test_plain_in_eval_is_the_plain_cross_entropy(options, inplace):
    criterion = DynamicCrossEntropyLoss(OSCILLATION, plain_in_eval=True, inplace_gradient=inplace, **options)
    same = DynamicCrossEntropyLoss(OSCILLATION, **options)
    assert torch.equal(criterion.get_extra_state(), same.get_extra_state())  # no part of the configuration
    plain = {name: value for name, value in options.items() if name != "normalization"}
    y = labels(4, 6)
    for step in (5, 13):
        criterion.set_step(step)
        same.set_step(step)
        x = normal(6, 4).requires_grad_()
        close(criterion.train()(x * 1, y), same(x, y))
        loss = criterion.eval()(x * 1, y)
        close(loss, F.cross_entropy(x, y, **plain))
        expected = torch.autograd.grad(F.cross_entropy(x, y, **plain), x)[0]
        close(torch.autograd.grad(loss, x)[0], expected)
        assert criterion.current_step == step


def test_plain_in_eval_for_any_oscillation():
    x, y = normal(2, 6, 4), labels(4, 6)
    ensemble = DynamicCrossEntropyLoss(Oscillation(4, torch.tensor([2.0, 5.0]), 10), plain_in_eval=True).eval()
    close(ensemble(x, y), torch.stack([F.cross_entropy(z, y) for z in x]))

    def uncalled(step):
        raise AssertionError

    function = DynamicCrossEntropyLoss(Oscillation.from_function(uncalled, 4), plain_in_eval=True).eval()
    close(function(x[0], y), F.cross_entropy(x[0], y))
    close(function(x[0], x[1].softmax(1)), F.cross_entropy(x[0], x[1].softmax(1)))
    moved = nn.Sequential(function).to("meta")[0]
    assert torch.device("meta") in moved._plain._placed
    assert copy.deepcopy(ensemble).plain_in_eval


def test_a_step_of_ones_own_leaves_the_count_alone():
    table = torch.rand(5, 4, dtype=torch.float64)
    x, y = normal(6, 4).requires_grad_(), labels(4, 6)
    for oscillation in (OSCILLATION, Oscillation.from_function(lambda s: table[s % 5], 4)):
        for inplace in (False, True):
            criterion = DynamicCrossEntropyLoss(oscillation, inplace_gradient=inplace)
            criterion.set_step(3)
            steps = [17, np.int64(17), np.array(17)]
            if oscillation is OSCILLATION:
                steps.append(torch.tensor(17))
            for step in steps:
                for loss in (criterion(x * 1, y, step=step), criterion(x * 1, y, step)):
                    close(loss, dynamic_cross_entropy(x, y, oscillation, 17))
                    assert criterion.current_step == 3
            close(criterion(x * 1, y), dynamic_cross_entropy(x, y, oscillation, 3))


@pytest.mark.parametrize("of", [np.float32, np.float64, np.int64, np.array, int])
def test_numpy_numbers_are_numbers(of):
    whole = np.int64 if of in (np.float32, np.float64) else of
    plain, given = Oscillation(4, 9, 10, start_step=2, stop_step=30), {"start_step": whole(2), "stop_step": whole(30)}
    oscillation = Oscillation(whole(4), of(9), of(10), class_order=np.arange(4), **given)
    assert Oscillation(4, 9, 10, class_order=[whole(c) for c in (1, 0, 2, 3)]).config()["class_order"][0] == 1
    assert {**oscillation.config(), "class_order": None} == plain.config()
    assert type(oscillation.config()["stop_step"]) is int
    assert torch.equal(oscillation.weights(whole(7)), plain.weights(7))
    assert torch.equal(oscillation.turn(whole(17)), plain.turn(17))
    x, y, smoothing = normal(6, 4), labels(4, 6), 1.0 if of in (np.int64, int) else 0.25
    options = {"ignore_index": whole(2), "label_smoothing": of(smoothing)}
    for call in (dynamic_cross_entropy, loss_and_gradient):
        expected = call(x, y, plain, 17, ignore_index=2, label_smoothing=smoothing)
        close(call(x, y, oscillation, whole(17), **options), expected)
    criterion = DynamicCrossEntropyLoss(oscillation, **options)
    criterion.set_step(whole(17))
    assert criterion.current_step == 17
    close(criterion(x, y), expected[0])
    again = DynamicCrossEntropyLoss(oscillation, ignore_index=2, label_smoothing=smoothing)
    again.load_state_dict(criterion.state_dict())


def test_the_oscillation_goes_to_a_device_with_its_module():
    """So that neither a compiled call nor a captured one is the first to need it there."""
    criterion = DynamicCrossEntropyLoss(Oscillation(3, 70, 100))
    meta = torch.device("meta")
    assert meta not in criterion.oscillation._placed
    assert torch.nn.Sequential(criterion).to(meta)[0] is criterion
    assert criterion.current_step.device == meta and meta in criterion.oscillation._placed


def test_function_and_ensemble_modules():
    x, y = normal(2, 6, 4), labels(4, 6)
    table = torch.rand(5, 4, dtype=torch.float64)
    criterion = DynamicCrossEntropyLoss(Oscillation.from_function(lambda s: table[s % 5], 4))
    ensemble = DynamicCrossEntropyLoss(Oscillation(4, torch.tensor([2.0, 5.0]), 10))
    for step in range(7):
        close(criterion(x[0], y), F.cross_entropy(x[0], y, weight=table[step % 5], reduction="sum") / 6)
        close(ensemble(x, y), reference.cross_entropy(x, y, ensemble.oscillation, step))
        criterion.step()
        ensemble.step()
