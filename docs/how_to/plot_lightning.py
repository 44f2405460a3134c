"""
Lightning
=========

Two callbacks: one sets the loss to Lightning's own ``global_step``, which counts optimizer steps (also where gradients
are accumulated) and is restored from a checkpoint; the other logs eigenvalues with the trainer's logger, and its
tracker is part of the checkpoint, too.
"""

import logging
import tempfile
import warnings

import lightning
import matplotlib.pyplot as plt
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dynloss_ext import DynamicCrossEntropyLoss, EigenTracker, HessianOperator, Oscillation, plot, stability_limit
from dynloss_ext.integrations.lightning import EigenvalueCallback, StepCallback

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")
torch.set_num_threads(1)
labels = torch.arange(3).repeat(60)
inputs = torch.randn(180, 2, generator=torch.Generator().manual_seed(0)) + 2 * torch.eye(3, 2)[labels]


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 40), nn.Tanh(), nn.Linear(40, 3))
        self.criterion = DynamicCrossEntropyLoss(Oscillation(num_classes=3, amplitude=40, period=100))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return self.criterion(self.net(x), y)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(*batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def hessian_of(module: Classifier) -> HessianOperator:
    return HessianOperator(lambda: module.loss(inputs, labels), module.net.named_parameters())


def fit(steps: int, folder: str, checkpoint: str | None = None) -> tuple[lightning.Trainer, Tensor]:
    """The trainer, and the table that its logger wrote: λ₁ to λ₃ and the step, a row for every fifth step."""
    lightning.seed_everything(0, verbose=False)
    curvature = EigenvalueCallback(hessian_of, EigenTracker(k=3), every_n_steps=5)
    callbacks = [StepCallback(), curvature, ModelCheckpoint(folder, "half", every_n_train_steps=150)]
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    logger = CSVLogger(folder)
    trainer = lightning.Trainer(accelerator="cpu", max_steps=steps, callbacks=callbacks, logger=logger, **quiet)
    # Full batches: the plain 2 / learning rate is their limit.
    trainer.fit(Classifier(), DataLoader(TensorDataset(inputs, labels), batch_size=180), ckpt_path=checkpoint)
    return trainer, torch.from_numpy(np.loadtxt(f"{logger.log_dir}/metrics.csv", delimiter=",", skiprows=1))


# %%
# A run of 300 steps, and one of 150 that a second trainer goes on with from its checkpoint.

with tempfile.TemporaryDirectory() as folder:
    trainer, whole = fit(300, f"{folder}/whole")
    _, before = fit(150, f"{folder}/first")
    _, after = fit(300, f"{folder}/second", f"{folder}/first/half.ckpt")
halves = torch.cat([before, after])
print(f"{len(whole)} updates, λ₁ up to {whole[:, 0].max():.2f}")
print(f"resumed with the same bits: {torch.equal(whole, halves)}")

plt.style.use(plot.STYLE)
figure, axis = plt.subplots(figsize=(6.5, 3), layout="constrained")
for i in range(3):
    axis.plot(whole[:, 3], whole[:, i], color="#cccccc", lw=4, label="in one go" if i == 0 else None)
    axis.plot(halves[:, 3], halves[:, i], color=plot.EIGENVALUE_COLOURS[i], label=rf"$\lambda_{i + 1}$")
axis.axvline(150, color=plot.START_COLOUR, lw=0.8, label="resumed")
axis.axhline(stability_limit(trainer.optimizers[0]), color=plot.STOP_COLOUR, ls=":", label="2 / learning rate")
axis.set(xlabel="global_step", ylabel="eigenvalue of the Hessian")
figure.legend(loc="outside upper center", ncols=6)
plt.show()

# %%
# The grey curves of the first trainer lie under those of the two halves. λ₁ comes up to 2 / learning rate where one
# turn ends and the next begins, and stays near it for no longer than the landscape is tilted that way. The line holds
# for whole batches alone, as here; with smaller ones λ₁ of all the data may stay below it for good. With a
# ``TensorBoardLogger``, or any other, the same values are logged there. Without the first callback, call
# ``dynamic_cross_entropy(logits, target, oscillation, self.global_step)`` in the module.
