"""The callbacks inside the trainers that they are for; needs the extra `models`, but for what they share."""

import csv
import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dynloss_ext
from dynloss_ext import DynamicCrossEntropyLoss, EigenTracker, HessianOperator, Oscillation
from dynloss_ext.integrations._periodic import PeriodicTracker

OSCILLATION = Oscillation(3, amplitude=20, period=8)
LABELS = torch.arange(3).repeat(8)
INPUTS = torch.randn(24, 2, generator=torch.Generator().manual_seed(0)) + 2 * torch.eye(3, 2)[LABELS]
BATCH = 4  # so that an epoch has six


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 3))


def hessian(net, criterion):
    return HessianOperator(lambda: criterion(net(INPUTS), LABELS), net.named_parameters())


# ---- what they share


@pytest.mark.parametrize("package", ["lightning", "transformers"])
def test_a_missing_package_is_named(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"dynloss_ext.integrations.{package}", raising=False)
    with pytest.raises(ImportError, match=f"^{package}: expected the package, got none .*: pip install {package}"):
        importlib.import_module(f"dynloss_ext.integrations.{package}")


def test_they_are_imported_on_demand():
    names = "lightning", "transformers", "dynloss_ext.integrations"
    ask = f"import sys, dynloss_ext; print(sys.modules.keys() & {set(names)})"
    folder = Path(dynloss_ext.__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", ask], cwd=folder, capture_output=True, text=True)
    assert result.stdout.strip() == "set()", result.stderr


def quadratic(net):
    return HessianOperator(lambda: net(INPUTS).square().mean(), net.parameters())


def steps_of_updates(periodic, net, steps):
    return [step for step in steps if periodic._update(net, step)]


def test_an_update_every_n_steps_and_one_a_step():
    net, tracker = network(), EigenTracker(k=1)
    periodic = PeriodicTracker(quadratic, tracker, every_n_steps=3)
    assert steps_of_updates(periodic, net, [0, 0, 1, 2, 3, 3, 4, 4, 6, 8, 10]) == [0, 3, 6, 10]
    assert tracker.num_updates == 4
    assert steps_of_updates(periodic, net, [0, 1, 3]) == [0, 3]  # of another training


def test_a_resting_eigenvalue_is_asked_for_less_often():
    periodic = PeriodicTracker(quadratic, EigenTracker(k=1, max_interval=8), every_n_steps=2)
    assert steps_of_updates(periodic, network(), range(40)) == [0, 2, 4, 8, 16, 24, 32]


def test_the_modes_of_the_model_are_put_back():
    net = network()
    net[1].eval()
    seen = []

    def operator(model):
        model.eval()
        seen.append(model.training)
        return quadratic(model)

    assert set(PeriodicTracker(operator, EigenTracker(k=2))._update(net, 0)) == {"eigenvalue/1", "eigenvalue/2"}
    assert [module.training for module in net.modules()] == [True, True, False, True]
    with pytest.raises(TypeError, match=r"^operator: expected to return an operator of curvature, got Sequential"):
        PeriodicTracker(lambda model: model.eval(), EigenTracker())._update(net, 0)
    assert [module.training for module in net.modules()] == [True, True, False, True]
    assert seen == [False]


@pytest.mark.parametrize(
    "change, kind, message",
    [
        ({"operator": 1}, TypeError, "operator: expected a callable, got int"),
        ({"tracker": 3}, TypeError, "tracker: expected an EigenTracker, got int"),
        ({"every_n_steps": 0}, ValueError, "every_n_steps: expected an int >= 1, got 0"),
        ({"name": "a/b"}, ValueError, "name: expected a word of letters, digits and underscores, got 'a/b'"),
        ({"name": 1}, ValueError, "name: expected a word of letters, digits and underscores, got 1"),
    ],
)
def test_bad_input(change, kind, message):
    with pytest.raises(kind, match=message):
        PeriodicTracker(**{"operator": quadratic, "tracker": EigenTracker(), **change})


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_state_that_was_loaded_on_the_cpu_goes_to_the_operators_device():
    net = network().cuda()

    def operator(model):
        return HessianOperator(lambda: model(INPUTS.cuda()).square().mean(), model.parameters())

    first, second = (PeriodicTracker(operator, EigenTracker(k=1), every_n_steps=1) for _ in range(2))
    first._update(net, 0)
    state = first.state_dict()
    state["tracker"]["start"] = state["tracker"]["start"].cpu()
    state["tracker"]["result"]["vectors"] = state["tracker"]["result"]["vectors"].cpu()
    second.load_state_dict(state)
    assert second._update(net, 1) == first._update(net, 1)


# ---- Lightning


def lightning_module(criterion):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.criterion, self.steps = network(), criterion, []

        def training_step(self, batch, batch_idx):
            self.steps.append(int(self.criterion.current_step))
            return self.criterion(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.5)

    return Module()


def fit(folder, steps, checkpoint=None, accumulate=1, tensorboard=False, **tracked):
    """A training of so many optimizer steps, with a checkpoint after six: the trainer and the module."""
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    from dynloss_ext.integrations.lightning import EigenvalueCallback, StepCallback

    module = lightning_module(DynamicCrossEntropyLoss(OSCILLATION))
    callbacks = [StepCallback(), ModelCheckpoint(folder, "six", every_n_train_steps=6)]
    for name, tracker in tracked.items():
        callbacks.append(EigenvalueCallback(lambda m: hessian(m.net, m.criterion), tracker, every_n_steps=2, name=name))
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        callbacks=callbacks,
        default_root_dir=folder,
        logger=[CSVLogger(folder), *([TensorBoardLogger(folder, "board")] if tensorboard else [])],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(INPUTS, LABELS), BATCH), ckpt_path=checkpoint)
    return trainer, module


def logged(trainer):
    """The rows of eigenvalues in the trainer's CSV file."""
    trainer.logger.save()
    with open(Path(trainer.logger.log_dir) / "metrics.csv") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


@pytest.mark.filterwarnings("ignore")
def test_lightning_counts_the_optimizers_steps(tmp_path):
    _, module = fit(tmp_path, 5, accumulate=3)
    assert module.steps == [step for step in range(5) for _ in range(3)]
    assert module.criterion.current_step == 5


@pytest.mark.filterwarnings("ignore")
def test_lightning_resumes_the_loss_and_the_tracker(tmp_path):
    trackers = [{"eigenvalue": EigenTracker(k=2), "smallest": EigenTracker(k=1, which="SA")} for _ in range(3)]
    trainer, whole = fit(tmp_path / "whole", 11, accumulate=2, **trackers[0])
    first, _ = fit(tmp_path / "half", 6, accumulate=2, **trackers[1])
    second, half = fit(tmp_path, 11, tmp_path / "half" / "six.ckpt", accumulate=2, **trackers[2])
    assert half.steps == whole.steps[12:]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, half.state_dict()[name]), name

    rows = logged(trainer)
    assert [row["step"] for row in rows if "eigenvalue/2" in row] == [0, 2, 4, 6, 8, 10]
    assert logged(first) + logged(second) == rows
    for name, tracker in trackers[0].items():
        assert (trackers[2][name].num_updates, trackers[2][name].num_hvp) == (tracker.num_updates, tracker.num_hvp)


@pytest.mark.filterwarnings("ignore")
def test_lightning_logs_what_a_loop_by_hand_measures(tmp_path):
    trainer, _ = fit(tmp_path, 7, eigenvalue=EigenTracker(k=2))
    net, criterion, tracker, expected = network(), DynamicCrossEntropyLoss(OSCILLATION), EigenTracker(k=2), []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for step in range(7):
        if step % 2 == 0:
            expected.append(tracker.update(hessian(net, criterion)).values.tolist())
        rows = slice(step % 6 * BATCH, (step % 6 + 1) * BATCH)
        optimizer.zero_grad()
        criterion(net(INPUTS[rows]), LABELS[rows]).backward()
        optimizer.step()
        criterion.step()
    assert [[row["eigenvalue/1"], row["eigenvalue/2"]] for row in logged(trainer)] == expected


def scalars(folder):
    """Of an event file: (step, value) by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = Path(folder).rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.filterwarnings("ignore")
def test_lightning_writes_event_files_too(tmp_path):
    trainer, _ = fit(tmp_path, 5, tensorboard=True, eigenvalue=EigenTracker(k=2))
    rows = [row for row in logged(trainer) if "eigenvalue/1" in row]
    for name in ("eigenvalue/1", "eigenvalue/2"):
        seen = scalars(tmp_path / "board")[name]
        assert [step for step, _ in seen] == [0, 2, 4]
        assert [value for _, value in seen] == pytest.approx([row[name] for row in rows], rel=1e-6)


def in_shards(place):
    """A tracker whose vectors are said to be a shard."""
    tracker = EigenTracker(k=1)
    tracker.update(hessian(network(), DynamicCrossEntropyLoss(OSCILLATION)))
    tracker._place = place
    return tracker


def test_a_lightning_checkpoint_holds_no_shard():
    pytest.importorskip("lightning")
    from dynloss_ext.integrations.lightning import EigenvalueCallback

    callback = EigenvalueCallback(lambda m: None, in_shards([0, 2]))
    assert callback.state_dict() == {}
    callback.load_state_dict({})  # and goes on
    assert EigenvalueCallback(lambda m: None, in_shards(None)).state_dict()["tracker"]["num_updates"] == 1


@pytest.mark.filterwarnings("ignore")
def test_a_lightning_module_without_the_loss_is_refused():
    lightning = pytest.importorskip("lightning")
    from dynloss_ext.integrations.lightning import StepCallback

    module = lightning_module(nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="pl_module: expected one with a DynamicCrossEntropyLoss among its modules"):
        StepCallback().on_train_start(lightning.Trainer(logger=False, accelerator="cpu"), module)


# ---- Hugging Face


class Classifier(nn.Module):
    """As a model of transformers is called."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        return {"logits": self.net(x)}


class CountingLoss:
    """What users write first."""

    def __init__(self):
        self.step, self.steps = 0, []

    def __call__(self, outputs, labels, num_items_in_batch):
        self.steps.append(self.step)
        self.step += 1
        loss = dynloss_ext.dynamic_cross_entropy(
            outputs["logits"], labels, OSCILLATION, self.steps[-1], reduction="sum"
        )
        return loss / num_items_in_batch


class Loss:
    """As the documentation has it."""

    def __init__(self):
        self.criterion, self.steps = DynamicCrossEntropyLoss(OSCILLATION, reduction="sum"), []

    def __call__(self, outputs, labels, num_items_in_batch):
        self.steps.append(int(self.criterion.current_step))
        return self.criterion(outputs["logits"], labels) / num_items_in_batch


def trained(folder, steps, loss, resume=None, accumulate=1, batch=BATCH, tracker=None, report_to="none"):
    """A training of so many optimizer steps, with a checkpoint every six."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from dynloss_ext.integrations.transformers import EigenvalueCallback, StepCallback

    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        learning_rate=0.5,
        lr_scheduler_type="constant",
        optim="sgd",
        save_steps=6,
        logging_strategy="no",
        report_to=report_to,
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        seed=0,
    )
    rows = [{"x": x, "labels": label} for x, label in zip(INPUTS, LABELS, strict=True)]
    trainer = transformers.Trainer(Classifier(), arguments, train_dataset=rows, compute_loss_func=loss)
    trainer.remove_callback(transformers.PrinterCallback)
    if isinstance(loss, Loss):
        trainer.add_callback(StepCallback(loss.criterion))
    if tracker is not None:
        trainer.add_callback(
            EigenvalueCallback(trainer, lambda model: hessian(model.net, loss.criterion), tracker, every_n_steps=2)
        )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_the_trainer_counts_the_optimizers_steps(tmp_path):
    loss, whole = Loss(), Loss()
    pieces = trained(tmp_path / "pieces", 5, loss, accumulate=3)
    assert loss.steps == [step for step in range(5) for _ in range(3)]
    together = trained(tmp_path / "together", 5, whole, batch=3 * BATCH)
    assert whole.steps == list(range(5))
    for p, q in zip(pieces.model.parameters(), together.model.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_the_trainer_resumes_the_loss(tmp_path):
    whole, half, counting = Loss(), Loss(), CountingLoss()
    uninterrupted = trained(tmp_path / "whole", 9, whole)
    trained(tmp_path / "half", 6, Loss())
    resumed = trained(tmp_path / "half", 9, half, resume=True)
    assert whole.steps == list(range(9)) and half.steps == [6, 7, 8]
    for p, q in zip(uninterrupted.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)
    trained(tmp_path / "half", 9, counting, resume=str(tmp_path / "half" / "checkpoint-6"))
    assert counting.steps == [0, 1, 2]  # without a word: what the callback is for


def eigenvalues(trainer):
    return [row for row in trainer.state.log_history if "eigenvalue/1" in row]


def test_the_trainer_logs_eigenvalues_and_resumes_the_tracker(tmp_path):
    trackers = [EigenTracker(k=2) for _ in range(3)]
    whole = trained(tmp_path / "whole", 11, Loss(), tracker=trackers[0], accumulate=2)
    trained(tmp_path / "half", 6, Loss(), tracker=trackers[1], accumulate=2)
    resumed = trained(tmp_path / "half", 11, Loss(), resume=True, tracker=trackers[2], accumulate=2)
    assert [row["step"] for row in eigenvalues(whole)] == [0, 2, 4, 6, 8, 10]
    assert eigenvalues(resumed) == eigenvalues(whole)
    assert all(row["eigenvalue/1"] > row["eigenvalue/2"] for row in eigenvalues(whole))
    assert (trackers[2].num_updates, trackers[2].num_hvp) == (trackers[0].num_updates, trackers[0].num_hvp)


def test_the_trainer_writes_event_files_too(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = trained(tmp_path, 5, Loss(), tracker=EigenTracker(k=2), report_to=["tensorboard"])
    seen = scalars(tmp_path / "board")
    for name in ("eigenvalue/1", "eigenvalue/2"):
        (tag,) = [tag for tag in seen if tag.endswith(name)]
        rows = [(row["step"], row[name]) for row in eigenvalues(trainer)]
        assert [step for step, _ in seen[tag]] == [step for step, _ in rows] == [0, 2, 4]
        assert [value for _, value in seen[tag]] == pytest.approx([value for _, value in rows], rel=1e-6)


def test_every_process_has_a_file_of_its_shard(tmp_path):
    transformers = pytest.importorskip("transformers")
    from dynloss_ext.integrations.transformers import EigenvalueCallback

    state = transformers.TrainerState(global_step=6)

    def on(rank, event, tracker):
        trainer = SimpleNamespace(log=print)
        arguments = SimpleNamespace(output_dir=tmp_path, should_save=rank == 0, process_index=rank)
        getattr(EigenvalueCallback(trainer, lambda m: None, tracker), event)(arguments, state, None)
        return tracker.state_dict()["place"]

    for rank in (1, 0):
        on(rank, "on_save", in_shards([rank, 2]))
    assert [on(rank, "on_train_begin", EigenTracker(k=1)) for rank in range(2)] == [[0, 2], [1, 2]]


def test_a_checkpoint_from_elsewhere_starts_the_tracker_anew(tmp_path):
    trained(tmp_path / "half", 6, Loss(), tracker=EigenTracker(k=2))
    folder = tmp_path / "half" / "checkpoint-6"
    with pytest.warns(UserWarning, match=r"tracker: expected its state in .*, got no such file: it starts anew"):
        trained(tmp_path / "moved", 7, Loss(), resume=str(folder), tracker=(fresh := EigenTracker(k=2)))
    assert fresh.num_updates == 1
    given = EigenTracker(k=2)
    given.load_state_dict(torch.load(folder / "eigenvalue_tracker.pt")["tracker"])
    trained(tmp_path / "moved", 7, Loss(), resume=str(folder), tracker=given)
    assert given.num_updates == 4


def test_bad_input_of_the_trainers_callbacks():
    pytest.importorskip("transformers")
    from dynloss_ext.integrations.transformers import EigenvalueCallback, StepCallback

    with pytest.raises(TypeError, match=r"criterion: expected a DynamicCrossEntropyLoss, got CrossEntropyLoss"):
        StepCallback(nn.CrossEntropyLoss())
    with pytest.raises(TypeError, match=r"trainer: expected a transformers.Trainer, got EigenTracker"):
        EigenvalueCallback(EigenTracker(), quadratic, EigenTracker())
