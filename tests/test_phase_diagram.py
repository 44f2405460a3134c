"""phase_diagram.py: its grid, its folder under all that may happen to it, and what the figures say."""

import dataclasses
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import phase_diagram
from common import diagrams, dynamics, sweep
from common.run import RunError
from common.spiral_sweep import SpiralSweep
from common.sweep import SweepFolder, chunks_of, read_values, run_here, run_on_dask
from dynloss_ext import Oscillation

SCRIPT = Path(phase_diagram.__file__)
SMALL = ("--steps", 60, "--amplitudes", 3, 30, "--periods", 5, 10, "--widths", 6, "--points", 8, "--seeds", 2)


def run(*arguments):
    return phase_diagram.main([str(argument) for argument in arguments])


def rows_of(folder):
    rows = pq.read_table(folder / "table.parquet").to_pylist()
    return sorted(rows, key=lambda row: [row[name] for name in ("width", "lr", "amplitude", "period", "seed")])


# ---- values on the command line


@pytest.mark.parametrize("words, expected", [
    (["1", "10", "70"], [1, 10, 70]),
    (["70", "1", "1.0"], [1, 70]),
    (["1:5:3"], [1, 3, 5]),
    (["log:1:1000:4", "5"], [1, 5, 10, 100, 1000]),
    ([], []),
])  # fmt: skip
def test_values(words, expected):
    assert read_values("--x", words) == expected


@pytest.mark.parametrize("word", ["a", "1:2", "1:2:1", "2:1:3", "log:5", "log:0:10:3", "1:2:3:4", "nan", "inf", ""])
def test_values_that_are_none(word):
    with pytest.raises(ValueError, match=f"--x: expected numbers, or ranges .*, got {word}"):
        read_values("--x", [word])


def test_members_are_all_combinations_and_the_plain_loss_once():
    config = phase_diagram.DiagramConfig(amplitudes=("1", "5", "9"), periods=("10:30:3",), seeds=2, seed=4)
    members = config.members()
    assert len(members) == 2 * (1 + 2 * 3) and {member["seed"] for member in members} == {4, 5}
    assert [member["amplitude"] for member in members[:2]] == [1.0, 1.0]
    assert (
        members
        == phase_diagram.DiagramConfig(amplitudes=("5", "9"), periods=("10.2", "20", "30"), seeds=2, seed=4).members()
    )


@pytest.mark.parametrize("options, message", [
    (["--amplitudes", "0.5"], "--amplitudes: expected numbers of at least 1"),
    (["--periods", "0.2"], "--periods: expected numbers of at least 1"),
    (["--learning-rates", "0"], "--learning-rates: expected numbers of more than 0"),
    (["--seeds", "0"], "--seeds: expected at least 1, got 0"),
    (["--stop", "2"], "--stop: expected a share from 0 to 1, got 2.0"),
    (["--shard", "3/2"], "--shard: expected i/n with 1 <= i <= n, got 3/2"),
    (["--workers", "1", "--cluster", "tcp://127.0.0.1:1"], "--cluster: expected none with --workers"),
    (["--experiment", "wrn"], "--data: expected an existing folder with CIFAR-10"),
    (["--chunk-members", "0"], "--chunk-members: expected at least 1, or none, got 0"),
])  # fmt: skip
def test_bad_options_are_named(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit):
        run("--out", tmp_path / "sweep", *options)
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "sweep").exists()


# ---- a member is a run


def test_a_member_has_the_numbers_of_the_spiral_script(tmp_path):
    import spiral_mlp

    work = SpiralSweep(
        steps=80, stop_step=74, points=8, noise=0.2, data_seed=0, init="glorot-normal", dtype="float64", measure="all"
    )
    members = [{"amplitude": a, "period": 9, "lr": 0.5, "width": 6, "seed": 3} for a in (1.0, 30.0)]
    rows = work(members)
    for member, row in zip(members, rows, strict=True):
        out = tmp_path / f"A{member['amplitude']:g}"
        options = [f"--{name}={member[name]}" for name in ("amplitude", "period", "lr", "width", "seed")]
        summary = spiral_mlp.main(
            [*options, "--steps=80", "--stop-step=74", "--points=8", "--eig-every=1", f"--out={out}"]
        )
        metrics = np.load(out / "metrics.npz")
        assert row["final_accuracy"] == summary["accuracy"] and row["best_accuracy"] == metrics["accuracy"].max()
        assert row["final_loss"] == pytest.approx(summary["loss"], rel=1e-10)
        assert row["lowest_loss"] == pytest.approx(metrics["loss"].min(), rel=1e-10)
        assert row["lambda_end"] == pytest.approx(metrics["eigenvalues"][-1, 0], rel=1e-3)
        cycle = metrics["eigenvalues"][74 - 30 : 74, 0]
        assert row["lambda_cycle"] == pytest.approx(cycle.max(), rel=0.05)
        assert not row["diverged"] and 0 <= row["validation_accuracy"] <= 1


def test_a_diverged_member_has_no_numbers():
    work = SpiralSweep(
        steps=50, stop_step=None, points=8, noise=0.2, data_seed=0, init="glorot-normal", dtype="float64", measure="all"
    )
    members = [{"amplitude": 9.0, "period": 5, "lr": lr, "width": 6, "seed": 0} for lr in (0.5, 1e200)]
    good, bad = work(members)
    assert bad["diverged"] and not good["diverged"]
    for name in ("final_accuracy", "final_loss", "validation_accuracy", "lambda_end", "lambda_cycle", "period_found"):
        assert bad[name] is None and good[name] is not None
    alone = work(members[:1])[0]
    assert alone == good
    for measure in ("curves", "end"):
        less = dataclasses.replace(work, measure=measure)(members[:1])[0]
        assert all(less[name] == good[name] for name in ("final_accuracy", "final_loss", "validation_loss"))


def test_dynamics_of_known_signals():
    step = np.arange(400)
    smooth = 1 + 0.1 * np.cos(step / 40)
    doubled = smooth + np.where(step < 200, 0.0, 0.05 * (-1.0) ** step)
    slow, fast = Oscillation(3, 1, 100), Oscillation(3, 50, 4)
    driven = 1 + 1e-3 * smooth + fast.weights(torch.from_numpy(step)).numpy() @ [0.1, 0.2, 0.3]
    assert dynamics.dynamics(step, driven, slow, 0, 400)["richest_period"] != 1
    assert dynamics.dynamics(step, driven, fast, 0, 400)["richest_period"] == 1
    assert dynamics.dynamics(step, smooth, slow, 0, 400)["richest_period"] == 1
    found = dynamics.dynamics(step, doubled, slow, 0, 400)
    assert found["richest_period"] == 2 and found["unstable_share"] == pytest.approx(0.5, abs=0.2)
    x = np.empty(400)
    x[0] = 0.3
    for i in range(399):
        x[i + 1] = 3.9 * x[i] * (1 - x[i])
    assert dynamics.dynamics(step, x, slow, 100, 400)["richest_period"] == dynamics.CHAOS


# ---- the folder


def test_a_sweep_leaves_table_summary_and_figures(tmp_path, capsys):
    summary = run("--out", tmp_path, *SMALL)
    rows = rows_of(tmp_path)
    assert summary["finished"] and summary["members"] == len(rows) == 2 * (1 + 4)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert "largest gain" in capsys.readouterr().out
    for name in ("accuracy", "dynamics", "slices"):
        assert (tmp_path / f"{name}_width6_lr1.png").stat().st_size > 10_000
    assert not list(tmp_path.glob("**/*.lock"))


def test_what_is_missing_is_computed_and_nothing_else(tmp_path):
    run("--out", tmp_path, *SMALL, "--chunk-members", 2)
    chunks = sorted((tmp_path / "chunks").iterdir())
    assert len(chunks) == 5
    before, rows = {chunk: chunk.stat().st_mtime_ns for chunk in chunks}, rows_of(tmp_path)
    chunks[0].unlink()
    chunks[1].write_bytes(chunks[1].read_bytes()[:-40])
    flipped = bytearray(chunks[2].read_bytes())
    flipped[len(flipped) // 3] ^= 1
    chunks[2].write_bytes(bytes(flipped))
    with pytest.raises(SystemExit, match=r"expected 5 chunks, got [23]: [23] are missing, [12] of them damaged"):
        run("--out", tmp_path, *SMALL, "--collect")
    run("--out", tmp_path, *SMALL)
    assert rows_of(tmp_path) == rows
    assert all(chunk.stat().st_mtime_ns == before[chunk] for chunk in chunks[3:])
    assert sorted((tmp_path / "chunks").iterdir()) == chunks


def test_shards_fill_one_folder(tmp_path, capsys):
    whole = tmp_path / "whole"
    run("--out", whole, *SMALL)
    for index in (1, 2, 3):
        summary = run("--out", tmp_path / "shards", *SMALL, "--chunk-members", 2, "--shard", f"{index}/3")
        assert summary["finished"] == (index == 3)
    assert "2 of 5 chunks are finished" in capsys.readouterr().out
    assert rows_of(tmp_path / "shards") == rows_of(whole)
    assert run("--out", tmp_path / "shards", *SMALL, "--collect")["finished"]


def test_another_sweep_in_the_folder_is_refused(tmp_path):
    run("--out", tmp_path, *SMALL)
    with pytest.raises(SystemExit, match=r"--out: expected a new name or .* steps = 61 instead"):
        run("--out", tmp_path, *SMALL, "--steps", 61)
    with pytest.raises(SystemExit, match=r"--chunk-members: expected .*, as in"):
        run("--out", tmp_path, *SMALL, "--chunk-members", 1)
    with pytest.raises(SystemExit, match="which holds none"):
        run("--out", tmp_path / "empty", *SMALL, "--collect")
    (tmp_path / "sweep.json").write_text("[")
    with pytest.raises(SystemExit, match="expected the options of a sweep, got something else"):
        run("--out", tmp_path, *SMALL)


def square(members):
    return [{"square": member["x"] ** 2} for member in members]


def slow(members):
    time.sleep(0.3)
    return square(members)


def small_sweep(path, count=6):
    members = [{"x": float(x)} for x in range(count)]
    folder = SweepFolder(path, {"kind": "test"}, 2)
    return folder, chunks_of({"kind": "test"}, members, 2, ())


def fill(path, ready, started):
    folder, chunks = small_sweep(path)
    ready.wait()
    run_here(folder, chunks, slow, lambda chunk: started.append(chunk.name))


def test_two_sweeps_in_one_folder_share_the_work(tmp_path):
    small_sweep(tmp_path)
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager:
        ready, done = manager.Event(), manager.list()
        processes = [context.Process(target=fill, args=(tmp_path, ready, done)) for _ in range(2)]
        for process in processes:
            process.start()
        began = time.monotonic()
        ready.set()
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
        assert len(done) == 6 and time.monotonic() - began < 30
    folder, chunks = small_sweep(tmp_path)
    assert [row["square"] for row in folder.collect(chunks).to_pylist()] == [0, 1, 4, 9, 16, 25]


def test_a_chunk_that_another_process_computes_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "_POLL", 0.01)
    folder, chunks = small_sweep(tmp_path)
    finished = []
    with folder._lock(chunks[0]) as mine:
        assert mine
        assert not SweepFolder(tmp_path, {"kind": "test"}, None).compute(chunks[0], square)
    run_here(folder, chunks, square, lambda chunk: finished.append(chunk))
    assert finished == chunks


def test_a_killed_process_loses_no_finished_chunk(tmp_path):
    command = [sys.executable, SCRIPT, *SMALL, "--steps", 20_000, "--chunk-members", 1, "--out", tmp_path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [str(word) for word in command], env=environment, stderr=subprocess.DEVNULL, cwd=Path(sweep.__file__).parent
    )
    try:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("chunks/*.parquet"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = {chunk: chunk.stat().st_mtime_ns for chunk in tmp_path.glob("chunks/*.parquet")}
    assert 2 <= len(kept) < 10
    summary = run(*SMALL, "--steps", 20_000, "--out", tmp_path)
    assert summary["members"] == 10
    assert all(chunk.stat().st_mtime_ns == time_ for chunk, time_ in kept.items())


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_full_disk_loses_no_finished_chunk(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("this container may not mount")
    try:
        swept, chunks = small_sweep(folder)
        swept.compute(chunks[0], square)
        (folder / "filler").write_bytes(bytes(128 * 1024 - sum(f.stat().st_size for f in folder.rglob("*")) - 16_384))
        filler = (folder / "more").open("wb")
        try:
            filler.write(bytes(64 * 1024))
            filler.flush()
        except OSError:
            pass
        with pytest.raises(RunError, match=r"No space left on device; finished chunks are kept"):
            swept.compute(chunks[1], square)
        assert swept.missing(chunks) == chunks[1:]
        filler = None
        (folder / "filler").unlink()
        (folder / "more").unlink()
        run_here(swept, chunks, square, lambda chunk: None)
        assert swept.collect(chunks).num_rows == 6
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# ---- Dask, on 127.0.0.1


def die_once(members):
    """Its first call kills the worker."""
    mark = Path(os.environ["DIE_ONCE"])
    if members[0]["x"] == 2.0 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return square(members)


def test_workers_of_this_machine(tmp_path):
    pytest.importorskip("distributed")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run("--out", whole, *SMALL)
    run("--out", parts, *SMALL, "--chunk-members", 2, "--workers", 2)
    assert rows_of(parts) == rows_of(whole)


def test_a_worker_killed_within_a_chunk(tmp_path, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setenv("DIE_ONCE", str(tmp_path / "mark"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    folder, chunks = small_sweep(tmp_path / "sweep")
    run_on_dask(folder, {"kind": "test"}, chunks, die_once, lambda chunk: None, workers=1)
    assert (tmp_path / "mark").exists()
    assert [row["square"] for row in folder.collect(chunks).to_pylist()] == [0, 1, 4, 9, 16, 25]


def test_a_scheduler_that_is_lost(tmp_path):
    distributed = pytest.importorskip("distributed")
    folder, chunks = small_sweep(tmp_path, 40)
    options = {"n_workers": 1, "host": "127.0.0.1", "dashboard_address": None, "memory_limit": 0}
    cluster = distributed.LocalCluster(threads_per_worker=1, **options)
    done = []

    def close_after_two(chunk):
        done.append(chunk)
        if len(done) == 2:
            cluster.close()

    with pytest.raises(RunError, match=r"expected a cluster that stays, got .*chunks are missing; run the sweep again"):
        run_on_dask(folder, {"kind": "test"}, chunks, slow, close_after_two, address=cluster.scheduler_address)
    assert 2 <= len(chunks) - len(folder.missing(chunks)) < len(chunks)
    run_here(folder, chunks, square, lambda chunk: None)
    assert folder.collect(chunks).num_rows == 40
    with pytest.raises(RunError, match=r"--cluster: expected a scheduler at tcp://127.0.0.1:9, got"):
        run_on_dask(folder, {"kind": "test"}, chunks, square, close_after_two, address="tcp://127.0.0.1:9")


# ---- what the figures say


def columns(amplitudes, periods, seeds, function):
    members = [(1.0, periods[-1], s) for s in range(seeds)]
    members += [(a, t, s) for a in amplitudes for t in periods for s in range(seeds)]
    a, t, s = (np.array(column, dtype=float) for column in zip(*members, strict=True))
    return {"amplitude": a, "period": t, "seed": s, "value": np.array([function(*member) for member in members])}


def test_gains_are_paired_by_seed():
    """A gain of 0.01 under seeds that differ by 1: pairing alone can see it."""
    noise = np.random.default_rng(0).normal(size=(50, 3, 3))

    def value(amplitude, period, seed):
        if amplitude == 1:
            return float(seed)
        return (
            seed + (0.01 if amplitude == 5 and period == 20 else 0.0) + 0.005 * noise[seed, amplitude % 3, period // 20]
        )

    grid = diagrams.Grid.of(columns([2, 5, 9], [10, 20], 50, value))
    gain, p = diagrams.paired_gain(grid.cells("value"), grid.plain("value"))
    clear = diagrams.significant(p)
    assert clear[1, 1] and gain[1, 1] == pytest.approx(0.01, abs=0.003)
    assert clear.sum() <= 2
    figure, found = diagrams.mean_and_gain(grid, {"value": "value"})
    assert found["value"]["at_amplitude"] == 5 and found["value"]["at_period"] == 20
    assert found["value"]["plain"] == 24.5 and found["value"]["cells"] == 6
    assert len(figure.axes) == 4


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_gain_in_words(seeds):
    grid = diagrams.Grid.of(columns([2, 5], [10], seeds, lambda amplitude, period, seed: 0.1 * amplitude + seed))
    words = phase_diagram.gain_in_words(diagrams.mean_and_gain(grid, {"value": "value"})[1]["value"])
    plain, gain, tests = words.split("; ")
    if seeds == 1:
        assert (plain, gain) == ("0.1000", "largest gain +0.4000 at A = 5, T = 10")
        assert tests == "significance needs two seeds"
    else:
        assert (plain, gain) == ("0.6000 ± 0.5000", "largest gain +0.4000 ± 0.0000 at A = 5, T = 10")
        assert tests == "of 2 cells 0 gain and 0 lose significantly"  # two equal gains are no evidence


def test_p_values_are_those_of_scipy():
    from scipy.stats import ttest_rel

    values = np.random.default_rng(1).normal(size=(3, 2, 12))
    plain = np.random.default_rng(2).normal(size=12)
    values[0, 0, 3] = np.nan
    gain, p = diagrams.paired_gain(values, plain)
    for place in np.ndindex(3, 2):
        good = np.isfinite(values[place])
        assert p[place] == pytest.approx(ttest_rel(values[place][good], plain[good]).pvalue)
        assert gain[place] == pytest.approx((values[place] - plain)[good].mean())
    same, p = diagrams.paired_gain(np.zeros((1, 5)), np.zeros(5))
    assert same[0] == 0 and p[0] == 1
    plain = np.array([113, 121, 140, 99, 104]) / 300
    _, p = diagrams.paired_gain(np.stack([plain + 2 / 300, plain - 2 / 300]), plain)
    assert p == pytest.approx([1 / 16, 1 / 16])  # of five signs that are all the same


def test_slices_show_periods_of_the_sweep_and_each_once():
    grid = diagrams.Grid.of(columns([2, 5], [20, 100], 2, lambda amplitude, period, seed: amplitude * period + seed))
    axis = diagrams.slices(grid, {"value": "value"}, (20, 33, 1000)).axes[0]
    lines = {line.get_label(): line.get_ydata() for line in axis.lines}
    assert list(lines) == ["$T$ = 20", "$T$ = 100", "$A$ = 1"]
    np.testing.assert_array_equal(lines["$T$ = 20"], [40.5, 100.5])


def test_false_discoveries_stay_rare():
    """Of 400 cells without any effect an uncorrected test would call 20 significant."""
    random = np.random.default_rng(3)
    _, p = diagrams.paired_gain(random.normal(size=(20, 20, 30)), np.zeros(30))
    assert (p < diagrams.LEVEL).sum() > 5
    assert diagrams.significant(p).sum() <= 1
    assert not diagrams.significant(np.array([np.nan])).any()


def test_ranks_and_the_most_common():
    values = np.array([[3.0, 1.0], [np.nan, 2.0]])
    np.testing.assert_array_equal(diagrams.ranked(values), [[1.0, 0.0], [np.nan, 0.5]])
    assert diagrams.ranked(np.array([5.0, 5.0, 1.0])).tolist() == [0.75, 0.75, 0.0]
    np.testing.assert_array_equal(diagrams.most_common(np.array([[2, 4, 4.0], [2, 2, 4.0]])), [4, 2])
    assert np.isnan(diagrams.most_common(np.array([[np.nan]]))).all()


def test_a_fine_grid_is_drawn_by_rank(tmp_path):
    options = ("--measure", "end", "--steps", 5, "--widths", 3, "--points", 4, "--seeds", 1)
    summary = run("--out", tmp_path, "--amplitudes", "log:2:50:66", "--periods", "1:66:66", *options)
    assert summary["members"] == 66 * 66 + 1
    assert (tmp_path / "lowest_loss_width3_lr1.png").stat().st_size > 10_000


@pytest.mark.parametrize("experiment", ["myrtle5", "wrn"])
def test_networks_on_images(tmp_path, experiment):
    threads = torch.get_num_threads()
    try:
        options = ("--experiment", experiment, "--preset", "smoke", "--synthetic", "--epochs", 4, "--seeds", 1)
        summary = run("--out", tmp_path, *options, "--amplitudes", 3, "--periods", 3)
    finally:
        torch.set_num_threads(threads)
    rows = rows_of(tmp_path)
    assert summary["members"] == len(rows) == 2 and rows[0]["amplitude"] == 1
    assert 0 <= rows[1]["validation_accuracy"] <= 1 and not rows[1]["diverged"]


def test_other_epochs_keep_the_course_of_the_preset():
    config = phase_diagram.DiagramConfig(experiment="myrtle5", preset="cpu", synthetic=True, epochs=15, eig_images=20)
    training = config.training()
    assert (training.epochs, training.peak_epoch, training.stop_epoch, training.eig_images) == (15, 6, 13, 20)


def test_help_tells_what_every_option_is(capsys):
    with pytest.raises(SystemExit):
        run("--help")
    shown = capsys.readouterr().out
    for field in dataclasses.fields(phase_diagram.DiagramConfig):
        assert f"--{field.name.replace('_', '-')}" in shown
    with pytest.raises(SystemExit):
        run("--resume", "--out", "nowhere/at/all")
    assert "--resume: expected a run in" in capsys.readouterr().err


# ---- two sweeps beside each other


def test_a_sweep_against_another_one(tmp_path, capsys):
    run(*SMALL, "--stop", 1, "--measure", "end", "--out", tmp_path / "never")
    other = tmp_path / "never" / "table.parquet"
    found = run(*SMALL, "--stop", 0.5, "--measure", "end", "--out", tmp_path / "half", "--against", other)
    gain = found["parts"]["width6_lr1"]["against"]["final_accuracy"]
    ours, theirs = (
        np.array([row["final_accuracy"] for row in rows_of(tmp_path / name) if row["amplitude"] != 1]).reshape(4, 2)
        for name in ("half", "never")
    )
    assert gain["plain"] == pytest.approx(theirs.mean()) and gain["cells"] == 4
    assert gain["plain_standard_error"] == pytest.approx(theirs.mean(0).std(ddof=1) / 2**0.5)  # two seeds, not 8 values
    assert (ours != theirs).any() and gain["largest_gain"] == pytest.approx((ours - theirs).mean(1).max())
    assert (tmp_path / "half" / "against_width6_lr1.png").stat().st_size > 1000
    assert "final_accuracy: never " in capsys.readouterr().out


def test_a_table_that_is_no_sweep_or_of_other_members(tmp_path, capsys):
    run(*SMALL, "--measure", "end", "--out", tmp_path / "first")
    table = tmp_path / "first" / "table.parquet"
    for options, message in (
        (
            ["--against", table, "--seeds", 3],
            "--against: expected all of this sweep's 15 members, 5 are not in .*: width 6",
        ),
        (["--against", tmp_path / "no.parquet"], "--against: expected the table.parquet of a sweep, got .*no.parquet"),
        (["--against", SCRIPT], "--against: expected the table.parquet of a sweep, got .*phase_diagram.py"),
    ):
        with pytest.raises((SystemExit, ValueError)) as error:
            run(*SMALL, *options, "--measure", "end", "--out", tmp_path / "second")
        assert re.search(message, str(error.value) + capsys.readouterr().err)
        assert not (tmp_path / "second" / "chunks").exists()
