"""What the README and the pages say of measurements is what the committed results say."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "tests" / "benchmarks" / "results"
README = (ROOT / "README.md").read_text()
BENCHMARKS = (ROOT / "docs" / "benchmarks.md").read_text()
CURVATURE = (ROOT / "docs" / "guide" / "curvature.md").read_text()
ENSEMBLES = (ROOT / "docs" / "guide" / "ensembles.md").read_text()
DIFFERENCES = " ".join((ROOT / "docs" / "concepts" / "differences.md").read_text().split())
LANCZOS = " ".join((ROOT / "docs" / "concepts" / "lanczos.md").read_text().split())
SOLVERS = {
    "`EigenTracker`": "EigenTracker (warm)",
    "`eigsh`, from scratch, with its audit": "eigsh (cold)",
    "SciPy `eigsh` on our product, `ncv=8`, warm": "SciPy ncv=8 (warm)",
    "SciPy `eigsh` on our product, `ncv=8`, from scratch": "SciPy ncv=8 (cold)",
    "SciPy `eigsh` on our product, default": "SciPy (cold)",
    "PyHessian": "PyHessian",
    "hessian-eigenthings": "hessian-eigenthings",
    "curvlinops with SciPy": "curvlinops",
}


def result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def two_digits(x: float) -> str:
    return f"{x:.2g}" if x < 10 else f"{x:.0f}"


@pytest.mark.parametrize("page", [README, BENCHMARKS], ids=["README", "benchmarks"])
def test_how_many_times_as_fast_the_loss_is(page: str) -> None:
    """On two threads, over the shapes."""
    cases = result("loss_cpu_2_threads")["cases"].values()
    for peer, said in (("eager", "times as fast as PyTorch eager"), ("compile", "times as fast as `torch.compile`")):
        ratios = [case[peer] / case["ours"] for case in cases]
        text = " ".join(page.split())
        assert f"{two_digits(min(ratios))} to {two_digits(max(ratios))} {said}" in text


def test_the_table_of_eigenvalue_solvers() -> None:
    spiral = result("eigensolvers_cpu")["spiral"]
    rows = re.findall(r"^\| ([^|]+) \| ([\d.]+) \| ([\d.]+) \| (\de-\d+) \|$", README, re.MULTILINE)
    assert len(rows) == len(SOLVERS)
    for name, products, ms, error in rows:
        measured = spiral["solvers"][SOLVERS[re.sub(r" \d+(\.\w+)+", "", name)]]
        assert products == f"{measured['products']:.1f}", name
        assert ms == f"{1e3 * measured['cpu_seconds_median']:.1f}", name
        assert float(error) == float(f"{measured['worst_error']:.0e}"), name
    assert f"{spiral['driver']['overhead_median']:.0%}".replace("%", " %") in CURVATURE


def test_what_the_guide_says_of_two_larger_networks() -> None:
    text = " ".join(CURVATURE.split())
    myrtle5, mlp = (result("eigensolvers_cpu")[name] for name in ("myrtle5", "mlp"))
    tracker, ncv8 = myrtle5["solvers"]["EigenTracker (warm)"], myrtle5["solvers"]["SciPy ncv=8 (warm)"]
    assert f"needs {tracker['products']:g} products" in text and f"SciPy {ncv8['products']:g} to" in text
    assert f"{mlp['parameters']:,} parameters" in text
    driver = mlp["driver"]
    assert f"{100 * driver['overhead_median']:.0f} % of the products for" in text
    assert f"at {1e3 * driver['product_seconds_median']:.0f} ms a product" in text
    for name in ("EigenTracker (warm)", "eigsh (cold)", "SciPy ncv=8 (warm)", "SciPy ncv=8 (cold)"):
        assert f"{1e3 * mlp['solvers'][name]['cpu_seconds_median']:.0f}" in text, name


def test_when_convolutions_are_faster_one_by_one() -> None:
    ratios = {
        row["width"]: row["milliseconds"]["one by one"] / row["milliseconds"]["vmap"]
        for row in result("vmap_cpu")["results"]
    }
    assert "one by one (`vmap=False`) takes about [half the time]" in ENSEMBLES
    assert "for Myrtle5s of width 8 to 32 and 60 images, and a tenth more for width 4 and 20 images" in ENSEMBLES
    assert ratios.pop(4) == pytest.approx(1.1, abs=0.05)
    assert list(ratios) == [8, 16, 32] and all(0.4 < ratio < 0.6 for ratio in ratios.values())


def test_what_the_size_of_a_basis_is_worth() -> None:
    products: dict[str, list[dict[str, float]]] = {"cheap": [], "dear": []}
    times: dict[str, list[dict[str, float]]] = {"cheap": [], "dear": []}
    for row in result("basis_sizes_cpu")["results"]:
        for found, key in ((products, "products"), (times, "milliseconds")):
            relative = {name: value / row[key]["default"] for name, value in row[key].items()}
            found[row["product"]].append(relative)
    both = [*products["cheap"], *products["dear"]]
    assert "as many products, to 3 % (5 % more in one case)" in LANCZOS
    twice = sorted(row["twice"] for row in both)
    assert twice[0] > 0.965 and twice[-2] < 1.035 and twice[-1] == pytest.approx(1.05, abs=0.005)
    assert "takes as long to 1 % or up to 16 % longer, with cheap ones up to 1.9 times as long" in LANCZOS
    assert min(row["twice"] for row in times["dear"]) > 0.985
    assert max(row["twice"] for row in times["dear"]) == pytest.approx(1.16, abs=0.005)
    assert max(row["twice"] for row in times["cheap"]) == pytest.approx(1.9, abs=0.05)
    assert "`max_basis=k + 12` cheap products take up to 11 % less time and dear ones the same to 2 %" in LANCZOS
    assert min(row["k + 12"] for row in times["cheap"]) == pytest.approx(0.89, abs=0.005)
    assert max(row["k + 12"] for row in times["cheap"]) < 1.025
    assert all(0.975 < row["k + 12"] < 1.025 for row in times["dear"])
    assert "of 3 % more products at most; `k + 6` needs up to 34 % more" in LANCZOS
    assert max(row["k + 12"] for row in both) < 1.035
    assert max(row["k + 6"] for row in both) == pytest.approx(1.34, abs=0.005)


def test_how_good_differences_are() -> None:
    rows = json.loads((ROOT / "docs" / "tables" / "differences.json").read_text())["rows"]
    of = {(row["network"], row["precision"], row["order"]): row for row in rows}
    assert "for an error that is up to about a hundred times as large" in DIFFERENCES
    ratios = [of[network, kind, 2]["error"] / row["error"] for (network, kind, order), row in of.items() if order == 4]
    assert 90 < max(ratios) < 120
    assert "**bfloat16 autocast: a per cent at best, ten at worst,** and of λ₁ up to a fifth." in DIFFERENCES
    coarse = [row for key, row in of.items() if "bfloat16" in key[1]]
    assert min(row["error"] for row in coarse) > 0.007 and max(row["error"] for row in coarse) < 0.12
    assert 0.18 < max(row["eigenvalue"] for row in coarse) < 0.22
    assert "**float32: four to six digits for smooth networks**" in DIFFERENCES
    smooth = [row for key, row in of.items() if key[1:] == ("float32", 4) and ("tanh" in key[0] or "GELU" in key[0])]
    assert len(smooth) == 2 and all(1e-6 < row["error"] < 1e-4 for row in smooth)
    tanh = [of[key]["gradients"][1] for key in (("784-256-10, tanh", "float32", order) for order in (2, 4))]
    assert "took half as many again" in DIFFERENCES and tanh[1] / (2 * tanh[0]) == pytest.approx(1.5, abs=0.05)


def test_what_shards_cost() -> None:
    text = DIFFERENCES
    found = result("shard_basis_cpu")
    whole, parts = found["whole"], found["processes"]
    first = parts[0]
    assert f"{found['parameters']:,} parameters in float64, each process holds {first['entries']:,} entries" in text
    assert f"are {first['basis_bytes'] / 1e6:.0f} MB there" in text
    growth = sorted((part["peak_bytes"] - part["peak_bytes_when_made"]) / 1e9 for part in parts)
    assert f"grew by {growth[0]:.2f} to {growth[-1]:.2f} GB" in text
    assert (
        f"took {first['num_hvp']} products of four gradients and {first['messages_per_product']:.1f} messages" in text
    )
    assert first["gradients_per_product"] == 4 and f"none above {first['largest_message_bytes']} bytes" in text
    assert f"is {whole['product_error']:.0e} from the recorded product" in text
    assert f"says {first['noise']:.0e} of its noise" in text and whole["product_error"] <= 4 * first["noise"]
    assert f"found {first['values'][0]:.2f} with a residual of {first['residuals'][0]:.2f}" in text
    assert f"the {whole['values'][0]:.2f} that recorded products" in text


def test_in_how_many_cases_ours_are_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs" / "tables")
    import measured

    cells = list(result("eigensolver_grid_cpu")["grid"]["solvers"].values())
    found = measured.contests(cells, measured.OURS, 1e-3, lambda name: True)
    won = sum(cell["ratio"] <= 1 for cell in found)
    from_nothing = measured.contests(cells, measured.OURS[1:], 1e-3, lambda name: "(warm)" not in name)
    won_from_nothing = sum(cell["ratio"] <= 1 for cell in from_nothing)
    readme, curvature, benchmarks = (" ".join(page.split()) for page in (README, CURVATURE, BENCHMARKS))
    for page in (readme, curvature):
        assert f"{won} of [{len(found)} cases]" in page
        assert f"{won_from_nothing} of {len(from_nothing)}" in page
    assert f"by up to {max(1 / cell['ratio'] for cell in found):.1f} times" in readme
    cold = [cell["solvers"]["eigsh (cold)"] for cell in cells]
    one, other = [row["largest_miss_probability"] for row in cold if row["worst_error"] > 1e-3]
    assert f"`miss_probability` is {one:.2f} and {other:.2f} there" in benchmarks
    assert f"up to {max(cell['ratio'] for cell in from_nothing) - 1:.0%}".replace("%", " %") in curvature


def test_the_figure_of_the_grid_is_that_of_its_results() -> None:
    path = ROOT / "tests/benchmarks/results/eigensolver_grid_cpu.json"
    with Image.open(path.with_suffix(".png")) as figure:
        assert figure.info["Source"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_is_said_of_the_h100() -> None:
    def numbers(name: str, stage: str) -> Any:
        return result(name)["stages"][stage]["numbers"]

    now, before = (numbers(name, "kernels")["rows"] for name in ("gpu_check_h100", "gpu_check_h100_before"))
    shapes = re.findall(r"^\| ([\d,]+) x (\d+) \| .* \| (0\.\d\d) \| (0\.\d\d) \|$", BENCHMARKS, re.MULTILINE)
    assert len(shapes) == 5
    shapes += re.findall(
        r"\(measured: ([\d,]+) x (\d+)\) \| .* \| (0\.\d\d) \| (0\.\d\d) \|$", BENCHMARKS, re.MULTILINE
    )
    assert len(shapes) == 6
    for rows, classes, then, today in shapes:
        name = f"{rows.replace(',', '')}x{classes}-float32-sum"
        assert (then, today) == (f"{before[name]['of_copy']:.2f}", f"{now[name]['of_copy']:.2f}"), name
    large = {}
    for name, row in now.items():
        size, dtype, reduction = name.split("-")
        if reduction == "sum" and 2e8 < row["bytes"] < 1e9:
            large[dtype, int(size.split("x")[1])] = row["of_copy"]
    assert max(share for (_, classes), share in large.items() if classes <= 32_000) < 0.9
    furthest = sorted((share, classes) for (dtype, classes), share in large.items() if dtype == "bfloat16")[:4]
    assert "at 33, 4,096, 1,025 and 100 classes (0.57 to 0.65)" in BENCHMARKS
    assert [classes for _, classes in furthest] == [33, 4096, 1025, 100]
    assert (round(furthest[0][0], 2), round(furthest[-1][0], 2)) == (0.57, 0.65)
    assert f"it is {now['8192x32000-float32-sum']['of_copy']:.2f} for 8192 x 32,000" in BENCHMARKS
    update = numbers("gpu_check_h100", "graphs")["rows"]["tracker update"]["update_over_graphed_products"]
    evidence = (ROOT / "docs" / "evidence.md").read_text()
    assert f"it took {update:.1f} times as long as its products" in evidence
    passed = numbers("gpu_check_h100_tests", "correctness")["passed"]
    for page in (README, evidence):
        assert f"{passed} tests passed" in page


def test_the_table_of_ensembles() -> None:
    times = {row["title"]: row["microseconds"] for row in result("ensembles_cpu")["results"]}
    table = README[README.index("**Many networks**") :]
    hidden, dtype = "", ""
    rows = re.findall(r"^\| (H = .*?|its Hessian product) \| (.*) \|$", table, re.MULTILINE)
    assert len(rows) == 7
    for name, cells in rows:
        if name.startswith("H = "):
            hidden, dtype, networks = re.fullmatch(r"H = (\d+), (\w+), (.*)", name).groups()
        else:
            networks = "product"
        title = {
            "one network": f"step of 2-{hidden}-3, 300 points, {dtype}, one thread",
            "product": f"Hessian product of 2-{hidden}-3, 300 points, {dtype}, one thread",
            "1,000 networks": f"1000 members of 2-{hidden}-3, 300 points, {dtype}, 2 threads, per member and step",
        }[networks]
        measured = times[title]
        jax = [measured[way] for way in ("jax", "jax vmap") if way in measured]
        wanted = [measured["fused"], measured["autograd"], measured.get("baddbmm"), min(jax) if jax else None]
        said = [cell.strip() for cell in cells.split("|")]
        assert said == [two_digits(x) if x else "" for x in wanted], name
