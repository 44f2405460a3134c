"""
Lightning
=========

Two pieces: the loss at Lightning's own ``global_step``, which counts optimizer steps (also where gradients are
accumulated) and is restored from a checkpoint; and a callback for the eigenvalues, whose ``state_dict`` is the
tracker's, so that the checkpoint holds that, too.
"""

import logging
import tempfile
import warnings

import lightning
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dynloss_ext import EigenTracker, HessianOperator, Oscillation, dynamic_cross_entropy, plot, stability_limit

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")
torch.set_num_threads(1)
labels = torch.arange(3).repeat(60)
inputs = torch.randn(180, 2, generator=torch.Generator().manual_seed(0)) + 2 * torch.eye(3, 2)[labels]


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 40), nn.Tanh(), nn.Linear(40, 3))
        self.oscillation = Oscillation(num_classes=3, amplitude=40, period=100)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return dynamic_cross_entropy(self.net(x), y, self.oscillation, self.global_step)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(*batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Curvature(lightning.Callback):
    """λ₁ to λ₃ of the loss over all the data, before every fifth step."""

    def __init__(self) -> None:
        self.tracker, self.steps, self.values = EigenTracker(k=3), [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if trainer.global_step % 5 == 0:
            H = HessianOperator(lambda: module.loss(inputs, labels), module.named_parameters())
            self.steps.append(trainer.global_step)
            self.values.append(self.tracker.update(H).values)

    def state_dict(self) -> dict:
        return self.tracker.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.tracker.load_state_dict(state)


def fit(steps: int, folder: str, checkpoint: str | None = None) -> tuple[lightning.Trainer, Curvature]:
    lightning.seed_everything(0, verbose=False)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    curvature = Curvature()
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=steps, callbacks=[curvature], default_root_dir=folder, **quiet
    )
    # Full batches: the plain 2 / learning rate is their limit.
    trainer.fit(Classifier(), DataLoader(TensorDataset(inputs, labels), batch_size=180), ckpt_path=checkpoint)
    return trainer, curvature


# %%
# A run of 300 steps, and one of 150 that a second trainer goes on with from its checkpoint.

with tempfile.TemporaryDirectory() as folder:
    trainer, whole = fit(300, folder)
    first, before = fit(150, folder)
    first.save_checkpoint(f"{folder}/half.ckpt")
    _, after = fit(300, folder, f"{folder}/half.ckpt")
values, halves = torch.stack(whole.values), torch.stack(before.values + after.values)
print(f"{len(values)} updates of {whole.tracker.num_hvp / len(values):.1f} products, λ₁ up to {values[:, 0].max():.2f}")
print(f"resumed with the same bits: {torch.equal(values, halves)}")

plt.style.use(plot.STYLE)
figure, axis = plt.subplots(figsize=(6.5, 3), layout="constrained")
for i in range(3):
    axis.plot(whole.steps, values[:, i], color="#cccccc", lw=4, label="in one go" if i == 0 else None)
    axis.plot(before.steps + after.steps, halves[:, i], color=plot.EIGENVALUE_COLOURS[i], label=rf"$\lambda_{i + 1}$")
axis.axvline(150, color=plot.START_COLOUR, lw=0.8, label="resumed")
axis.axhline(stability_limit(trainer.optimizers[0]), color=plot.STOP_COLOUR, ls=":", label="2 / learning rate")
axis.set(xlabel="global_step", ylabel="eigenvalue of the Hessian")
figure.legend(loc="outside upper center", ncols=6)
plt.show()

# %%
# The grey curves of the first trainer lie under those of the two halves. λ₁ comes up to 2 / learning rate where one
# turn ends and the next begins, and stays near it for no longer than the landscape is tilted that way. The line holds
# for whole batches alone, as here; with smaller ones λ₁ of all the data may stay below it for good.
