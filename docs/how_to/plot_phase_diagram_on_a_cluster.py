"""
A phase diagram on a cluster
============================

``python_examples/phase_diagram.py`` trains one network for every amplitude, period and seed, in chunks that lie in one
folder, each written once and whole. Who computes them is a matter of one option:

- ``--workers n``: n processes on this machine;
- ``--cluster tcp://host:8786``: the workers of a Dask scheduler of yours, on any number of machines that see the
  folder;
- ``--shard i/n``: one job of an array, which computes every n-th chunk and exits with status 3 while others are
  missing; a last job with ``--collect`` draws the figures.

Whoever is killed is started again with the same command and computes what is missing. Under Slurm, for instance::

    #SBATCH --array=1-50
    python python_examples/phase_diagram.py --out runs/diagram --seeds 20 --shard $SLURM_ARRAY_TASK_ID/50

Here are two workers and a sweep that is small enough to wait for.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pyarrow.parquet

here = Path(globals().get("__file__", "plot.py")).resolve()  # the gallery has no __file__, but runs in its folder
script = here.parents[2] / "python_examples" / "phase_diagram.py"
grid = "--amplitudes 10 30 --periods 50 200 800 --widths 10 --seeds 12 --steps 12000 --measure end"

# %%
# The sweep, and what it wrote.

with tempfile.TemporaryDirectory() as folder:
    command = [sys.executable, str(script), *grid.split(), "--chunk-members", "12", "--workers", "2", "--out", folder]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=one_thread, capture_output=True, text=True, timeout=300)
    if run.returncode != 0:
        raise RuntimeError(run.stderr)
    print(run.stdout.replace(folder, "FOLDER"))
    chunks = list(Path(folder, "chunks").glob("*.parquet"))
    table = pyarrow.parquet.read_table(Path(folder, "table.parquet"))
    print(f"{table.num_rows} networks in {len(chunks)} chunks; for each {', '.join(table.column_names[:8])}, ...")
    picture = plt.imread(Path(folder, "accuracy_width10_lr1.png"))

height, width = picture.shape[:2]
figure = plt.figure(figsize=(width / 150, height / 150))
axis = figure.add_axes((0, 0, 1, 1))
axis.imshow(picture)
axis.set_axis_off()
plt.show()

# %%
# On the left what the networks of a cell reach on average, on the right what that gains over A = 1 from the same
# initial values. Grey is what twelve seeds do not tell from chance, at a false discovery rate of 0.05 over the cells:
# the numbers on the left differ there, too, and mean nothing. And a gain here is one of a network of ten hidden
# units, which is too small for its spirals, after 12,000 steps.
