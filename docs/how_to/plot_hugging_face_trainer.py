"""
Hugging Face Trainer
====================

The Trainer takes a loss as ``compute_loss_func``, and its ``state.global_step`` counts optimizer steps and is part of
a checkpoint. A loss that counts its own calls would count the batches that gradients are accumulated over, and begin
at 0 again when training is resumed. Two callbacks: one sets the loss to the Trainer's step, the other logs eigenvalues.
The model here is a tiny BERT with random weights: nothing is downloaded.
"""

import tempfile

import matplotlib.pyplot as plt
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from dynloss_ext import DynamicCrossEntropyLoss, EigenTracker, HessianOperator, Oscillation, plot
from dynloss_ext.integrations.transformers import EigenvalueCallback, StepCallback

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)
set_seed(0)

# %%
# A made-up task: which of three tokens is the most frequent in a sentence of eight.

words = torch.randint(1, 4, (400, 8))  # 0 is BERT's padding
labels = words.mode(1).values - 1
sentences = [{"input_ids": words[i], "labels": labels[i]} for i in range(400)]

small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
# The Hessian of a random loss is refused.
no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
config = BertConfig(vocab_size=4, max_position_embeddings=8, num_labels=3, initializer_range=0.2, **small, **no_dropout)
model = BertForSequenceClassification(config)
oscillation = Oscillation(num_classes=3, amplitude=10, period=40)

# %%
# The Trainer adds up what this returns for the batches of a step, and hands over the number of labels in all of them:
# sums divided by it make the mean, however many batches there are.

criterion = DynamicCrossEntropyLoss(oscillation, reduction="sum")


def compute_loss(outputs, labels, num_items_in_batch):
    return criterion(outputs["logits"], labels) / num_items_in_batch


def accuracy(prediction):
    return {"accuracy": (prediction.predictions.argmax(1) == prediction.label_ids).mean().item()}


# %%
# Curvature by a closure, since the attention of a model of transformers has no second derivative otherwise: λ₁ of the
# weighted loss on 100 fixed sentences, before every fourth step.


def hessian_of(model):
    def loss():
        return criterion(model(input_ids=words[:100]).logits, labels[:100]) / 100

    return HessianOperator(loss, model.named_parameters())


# %%
# The rest is the Trainer's own. A step is two batches of 25 sentences.

tracker = EigenTracker(k=1)
batches = {"per_device_train_batch_size": 25, "gradient_accumulation_steps": 2}
rate = {"learning_rate": 5e-3, "lr_scheduler_type": "constant"}
evaluation = {"eval_strategy": "steps", "eval_steps": 4}
quiet = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(folder, max_steps=240, use_cpu=True, **batches, **rate, **evaluation, **quiet)
    data = {"train_dataset": sentences[:300], "eval_dataset": sentences[300:]}
    trainer = Trainer(model, arguments, **data, compute_loss_func=compute_loss, compute_metrics=accuracy)
    trainer.add_callback(StepCallback(criterion))
    trainer.add_callback(EigenvalueCallback(trainer, hessian_of, tracker, every_n_steps=4))
    trainer.remove_callback(PrinterCallback)
    trainer.train()

# %%
# Both are in the Trainer's own history, and with ``report_to="tensorboard"`` in TensorBoard.


def history(name):
    return zip(*((row["step"], row[name]) for row in trainer.state.log_history if name in row), strict=True)


steps, values = history("eigenvalue/1")
evaluated, right = history("eval_accuracy")
print(f"{model.num_parameters()} parameters; accuracy {right[0]:.2f}, at the end {right[-1]:.2f}")
print(f"λ₁ from {min(values):.2f} to {max(values):.2f}, {tracker.num_hvp / len(values):.1f} products an update")

plt.style.use(plot.STYLE)
figure, (above, middle, below) = plt.subplots(3, 1, figsize=(6.5, 4.6), sharex=True, layout="constrained")
for i, curve in enumerate(oscillation.weights(torch.arange(240)).T):
    above.plot(curve, color=plot.CLASS_COLOURS[i])
above.set_ylabel("class weight Γ")
middle.plot(evaluated, right, color="black")
middle.set_ylabel("held-out accuracy")
below.semilogy(steps, values, color="black")
below.set(xlabel="global_step", ylabel=r"$\lambda_1$")
figure.align_ylabels()
plt.show()

# %%
# λ₁ leaps by factors of ten from one measurement to the next: the loss is weighted otherwise, and the optimizer,
# AdamW with batches of 50, is not held below any limit on the curvature of these hundred sentences. That is why no 2
# / learning rate is drawn. Where the Trainer saves checkpoints, the tracker's state is in them:
# ``trainer.train(resume_from_checkpoint=True)`` goes on with it.
