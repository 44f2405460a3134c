r"""
Your own waveform
=================

The paper raises one class at a time along a triangle. A sine and a square come with the package; anything else is a
table of weights, ``Oscillation.from_table``, which every part of the package takes (compiled steps, CUDA graphs,
ensembles), or a Python function, ``Oscillation.from_function``, which is called at every step.

A built-in waveform is normalised, ΣΓ = C. Your own weights are used as they are: divide them yourself if a step is to
keep its size.
"""

import math

import matplotlib.pyplot as plt
import torch

from dynloss_ext import DynamicCrossEntropyLoss, Oscillation, PerceptronEnsemble, plot

torch.set_num_threads(1)
period, classes = 400, 3

# %%
# A chirp, written once as a function of the step: class 0 is raised, then 1, then 2, each turn with a sawtooth that
# rises slowly and falls at once, at twice the speed after 1200 steps and four times the speed after 2400.


def sawtooth(step: int) -> torch.Tensor:
    speed = 2 ** min(2, step // 1200)
    turn, phase = divmod(step * speed, period)
    raw = torch.ones(classes, dtype=torch.float64)
    raw[turn % classes] = 1 + 29 * phase / period
    return classes * raw / raw.sum()


schedules = {
    "triangle": Oscillation(classes, amplitude=30, period=period),
    "sine": Oscillation(classes, amplitude=30, period=period, waveform="sine"),
    "own sawtooth, faster and faster": Oscillation.from_table(torch.stack([sawtooth(s) for s in range(3600)])),
}

# %%
# The function and the table are the same loss to the last bit; only the table may be compiled or captured. A table
# repeats after its last row.

logits, target = torch.randn(6, classes, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
by_function = DynamicCrossEntropyLoss(Oscillation.from_function(sawtooth, classes))
by_table = DynamicCrossEntropyLoss(schedules["own sawtooth, faster and faster"])
print(by_function(logits, target, step=1234) == by_table(logits, target, step=1234))

# %%
# Three clouds of points, one small network, a training with each.

inputs = torch.randn(300, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
labels = torch.arange(3).repeat(100)
inputs += 1.2 * torch.stack([torch.sin(labels * 2 * math.pi / 3), torch.cos(labels * 2 * math.pi / 3)], 1)

plt.style.use(plot.STYLE)
figure, axes = plt.subplots(2, 3, figsize=(9, 3.8), sharex=True, sharey="row", layout="constrained")
for (name, oscillation), (above, below) in zip(schedules.items(), axes.T, strict=True):
    network = PerceptronEnsemble(inputs, labels, oscillation, hidden=30, lr=0.5, seeds=[0])
    records = network.train(3600)
    gamma = oscillation.weights(torch.arange(3600))
    for i in range(classes):
        above.plot(gamma[:, i], color=plot.CLASS_COLOURS[i], label=f"class {i}")
    below.plot(records.step, records.weighted_loss[:, 0], color="black", label="F, weighted")
    below.plot(records.step, records.loss[:, 0], color="#d55e00", label="cross-entropy, Γ = 1")
    above.set_title(name)
    below.set_xlabel("step")
    print(f"{name}: cross-entropy {records.loss[-1, 0]:.4f}, accuracy {records.accuracy[-1, 0]:.3f}")
axes[0, 0].set_ylabel("class weight Γ")
axes[1, 0].set_ylabel("loss")
entries = [axis.get_legend_handles_labels() for axis in axes[:, 0]]
figure.legend(*(above + below for above, below in zip(*entries, strict=True)), loc="outside lower center", ncols=5)
plt.show()

# %%
# The clouds overlap, so that no weights bring the loss to 0: while a class is raised, the boundary moves to its
# favour, F falls, and the plain cross-entropy rises. What one should not conclude is which waveform is best: this is
# one network, one seed and a task with nothing to gain.
