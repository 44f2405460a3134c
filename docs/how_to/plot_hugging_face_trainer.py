"""
Hugging Face Trainer
====================

The Trainer takes a loss as ``compute_loss_func``, and its ``state.global_step`` counts optimizer steps and is part of
a checkpoint: it is the step of the oscillation. Curvature is measured in a callback, by a closure, since the
attention of a model of transformers has no second derivative otherwise. The model here is a tiny BERT with random
weights: nothing is downloaded.
"""

import tempfile

import matplotlib.pyplot as plt
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from dynloss_ext import EigenTracker, HessianOperator, Oscillation, dynamic_cross_entropy, plot

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)
set_seed(0)

# %%
# A made-up task: which of three tokens is the most frequent in a sentence of eight.

words = torch.randint(1, 4, (400, 8))  # 0 is BERT's padding
labels = words.mode(1).values - 1
sentences = [{"input_ids": words[i], "labels": labels[i]} for i in range(300)]
held_out, held_out_labels = words[300:], labels[300:]

small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
no_dropout = {
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # the Hessian of a random loss is refused
config = BertConfig(vocab_size=4, max_position_embeddings=8, num_labels=3, initializer_range=0.2, **small, **no_dropout)
model = BertForSequenceClassification(config)
oscillation = Oscillation(num_classes=3, amplitude=10, period=40)


def loss_func(outputs, labels, num_items_in_batch=None):
    """Of evaluation, too. A step before the oscillation starts, such as -1, is the plain cross-entropy, Γ = 1."""
    return dynamic_cross_entropy(outputs["logits"], labels, oscillation, trainer.state.global_step)


class Curvature(TrainerCallback):
    """λ₁ of the weighted loss on 100 fixed sentences, before every fourth step, and the accuracy on others."""

    def __init__(self) -> None:
        self.tracker, self.rows = EigenTracker(k=1), []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step % 4 == 0:
            H = HessianOperator(lambda: loss_func(model(input_ids=words[:100]), labels[:100]), model.named_parameters())
            right = (model(input_ids=held_out).logits.argmax(1) == held_out_labels).double().mean().item()
            self.rows.append((state.global_step, self.tracker.update(H).values.item(), right))


# %%
# The rest is the Trainer's own.

curvature = Curvature()
rate = {"learning_rate": 5e-3, "lr_scheduler_type": "constant"}
quiet = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(folder, max_steps=240, per_device_train_batch_size=50, use_cpu=True, **rate, **quiet)
    trainer = Trainer(model, arguments, train_dataset=sentences, compute_loss_func=loss_func, callbacks=[curvature])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
steps, values, accuracy = zip(*curvature.rows, strict=True)
print(f"{model.num_parameters()} parameters; accuracy {accuracy[0]:.2f}, at the end {accuracy[-1]:.2f}")
print(
    f"λ₁ from {min(values):.2f} to {max(values):.2f}, {curvature.tracker.num_hvp / len(values):.1f} products an update"
)

plt.style.use(plot.STYLE)
figure, (above, middle, below) = plt.subplots(3, 1, figsize=(6.5, 4.6), sharex=True, layout="constrained")
for i, curve in enumerate(oscillation.weights(torch.arange(240)).T):
    above.plot(curve, color=plot.CLASS_COLOURS[i])
above.set_ylabel("class weight Γ")
middle.plot(steps, accuracy, color="black")
middle.set_ylabel("held-out accuracy")
below.semilogy(steps, values, color="black")
below.set(xlabel="global_step", ylabel=r"$\lambda_1$")
figure.align_ylabels()
plt.show()

# %%
# λ₁ leaps by factors of ten from one measurement to the next: the loss is weighted otherwise, and the optimizer,
# AdamW with batches of 50, is not held below any limit on the curvature of these hundred sentences. That is why no 2
# / learning rate is drawn. To go on from a checkpoint with the same tracker, save its ``state_dict`` in ``on_save``.
