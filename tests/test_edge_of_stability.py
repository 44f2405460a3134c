"""The optimizers' script: its folder, and one of its numbers by another route."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.func import functional_call, hessian

import edge_of_stability
from edge_of_stability import BATCHES, OPTIMIZERS, PRESETS, data_of, ending, network, train

SMOKE = PRESETS["smoke"]
STEPS = {"full batch": [2, 4], "large batches": [5, 10], "small batches": [14, 28]}


def test_a_run_leaves_metrics_summary_and_figures(tmp_path, capsys):
    summary = edge_of_stability.main(["--preset", "smoke", "--out", str(tmp_path)])
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert list(summary) == list(OPTIMIZERS)
    with np.load(tmp_path / "metrics.npz") as metrics:
        for name in OPTIMIZERS:
            for batches in BATCHES:
                assert metrics[f"{name} {batches} step"].tolist() == STEPS[batches]
                assert np.isfinite(metrics[f"{name} {batches} eigenvalue"]).all()
                measured = np.isfinite(metrics[f"{name} {batches} sharpness"])
                wanted = name in ("SGD", "momentum", "Nesterov") and batches != "full batch"
                assert measured.all() == measured.any() == wanted
    with Image.open(tmp_path / "figure.png") as figure:
        assert figure.size == (1440, 1350)
    for name in OPTIMIZERS:
        with Image.open(tmp_path / f"{name}.png") as figure:
            assert figure.size == (1440, 630)
    assert "Adam" in capsys.readouterr().out


def test_the_eigenvalue_is_that_of_the_dense_preconditioned_hessian():
    """Of Adam after four steps: torch's own optimizer again, its moments read by hand, the Hessian by torch.func."""
    images, labels = data_of(SMOKE)
    curve = train(SMOKE, "Adam", "full batch", images, labels)
    torch.manual_seed(SMOKE.seed)
    model = network(SMOKE.width)
    names, params = zip(*model.named_parameters(), strict=True)
    adam = torch.optim.Adam(params, lr=0.003)

    def loss_at(flat):
        pieces = (v.view(p.shape) for v, p in zip(flat.split([p.numel() for p in params]), params, strict=True))
        return (functional_call(model, dict(zip(names, pieces, strict=True)), images) - labels).square().sum() / 20

    for _ in range(4):
        adam.zero_grad()
        loss_at(torch.cat([p.reshape(-1) for p in params])).backward()
        adam.step()
    flat = torch.cat([p.detach().reshape(-1) for p in params])
    second = torch.cat([adam.state[p]["exp_avg_sq"].reshape(-1) for p in params])
    P = (1 - 0.9**4) * ((second / (1 - 0.999**4)).sqrt() + 1e-8)
    dense = P.rsqrt()[:, None] * hessian(loss_at)(flat) * P.rsqrt()
    assert curve["eigenvalue"][-1] == pytest.approx(torch.linalg.eigvalsh(dense)[-1].item(), rel=1e-3)
    assert curve["loss"][-1] == pytest.approx(loss_at(flat).item(), rel=1e-4)
    assert curve["limit"][-1] == pytest.approx(2 * 1.9 / (0.1 * 0.003))


def test_the_end_is_the_median_of_the_last_quarter():
    curve = {"step": np.arange(8), "loss": np.arange(8.0), "eigenvalue": np.array([0, 0, 0, 0, 0, 0, 2.0, 6.0])}
    curve |= {"limit": np.full(8, 4.0), "sharpness": np.array([0, 0, 0, 0, 0, 0, 2.0, 2.0])}
    curve["weighted_sharpness"] = 2 * curve["sharpness"]
    assert ending(curve) == {
        "loss": 7.0,
        "limit": 4.0,
        "share": 1.0,
        "batch sharpness": 0.5,
        "weighted batch sharpness": 1.0,
    }


def test_a_run_that_diverges_ends_where_it_does(tmp_path):
    summary = edge_of_stability.main(["--preset", "smoke", "--rate", "1e30", "--out", str(tmp_path)])
    assert summary["SGD"]["full batch"] == dict.fromkeys(
        ("loss", "limit", "share", "batch sharpness", "weighted batch sharpness")
    )
    assert (tmp_path / "figure.png").exists()


def test_options_that_make_no_run_are_refused():
    for changes, message in (
        ({"steps": 0}, "--steps: expected at least 1, got 0"),
        ({"rate": 0.0}, "--rate: expected more than 0, got 0.0"),
        ({"small_batch": 11}, "--small-batch: expected at most --images, got 11"),
        ({"records": 5}, "--records: expected at most --steps, got 5"),
        ({"resume": True}, "--resume: expected no --resume"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(SMOKE, **changes)


@pytest.mark.parametrize(
    ("name", "rate"),
    [("SGD", 2.0), ("momentum", 1.3), ("Nesterov", 1.5), ("Adam", 4.0), ("AdamW", 4.0), ("RMSprop", 1.5)],
)
def test_training_settles_at_the_limit_of_the_optimizer(name: str, rate: float):
    """A short one, at a higher rate. Gradient descent's limit is 1/1.9 of momentum's, 1/19 of Adam's with its β₁."""
    config = replace(PRESETS["cpu"], images=100, width=4, steps=400, records=20, rate=rate)
    curve = train(config, name, "full batch", *data_of(config))
    assert curve["eigenvalue"][0] / curve["limit"][0] < 1.5 and curve["step"][-1] == 400
    assert 0.8 < ending(curve)["share"] < 1.25
    assert curve["loss"][-1] < 0.1


def test_the_batch_sharpness_is_at_the_limit_where_the_largest_eigenvalue_stays_below():
    """In batches of five; arXiv 2412.20553."""
    sizes = {"images": 60, "width": 4, "small_batch": 5, "sharpness_batches": 100}
    config = replace(PRESETS["cpu"], steps=200, records=8, rate=1.5, **sizes)
    end = ending(train(config, "SGD", "small batches", *data_of(config)))
    assert 0.8 < end["weighted batch sharpness"] < 1.3 and end["share"] < 0.75


def test_the_committed_figure_is_of_the_defaults_and_the_page_says_its_numbers():
    figures = Path(edge_of_stability.__file__).parent / "figures"
    assert json.loads((figures / "edge_of_stability" / "config.json").read_text()) == PRESETS["cpu"].as_dict()
    summary = json.loads((figures / "edge_of_stability" / "summary.json").read_text())
    share = {(name, batches): f"{summary[name][batches]['share']:.2f}" for name in OPTIMIZERS for batches in BATCHES}
    full, large, small = ({name: share[name, batches] for name in OPTIMIZERS} for batches in BATCHES)
    ends = {name: summary[name]["small batches"] for name in ("SGD", "momentum")}
    plain = {name: f"{end['batch sharpness']:.2f}" for name, end in ends.items()}
    weighted = {name: f"{end['weighted batch sharpness']:.2f}" for name, end in ends.items()}
    assert full["momentum"] == full["Nesterov"]
    page = " ".join((figures / "README.md").read_text().split())
    for said in (
        f"is {full['SGD']} of the limit for SGD, {full['momentum']} for momentum and Nesterov, {full['Adam']} for Adam,"
        f" {full['AdamW']} for AdamW, {full['RMSprop']} for RMSprop",
        f"of 50 SGD ({large['SGD']}), Nesterov ({large['Nesterov']}) and RMSprop ({large['RMSprop']}) come as far,"
        f" momentum ({large['momentum']}), Adam ({large['Adam']}) and AdamW ({large['AdamW']}) do not",
        f"of ten λ₁ of SGD stays at {small['SGD']} while the batch sharpness is at {plain['SGD']}, and weighted at"
        f" {weighted['SGD']}",
        f"momentum stays at {small['momentum']} (batch sharpness {plain['momentum']}, weighted {weighted['momentum']})",
    ):
        assert said in page
