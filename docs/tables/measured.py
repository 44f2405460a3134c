"""Figures and tables of what was measured, made by each build of the site of JSON in tests/benchmarks/results and here.

    python docs/tables/measured.py docs/generated
    python docs/tables/measured.py grid tests/benchmarks/results/eigensolver_grid_cpu.json

writes NAME.md, which a page includes, and its figures; conf.py calls it at every build. Nothing is measured here: the
page says which command does it. The second draws the figure that is committed beside its results; redo.sh calls it.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import figures
from figures import Json, number

TABLES = Path(__file__).resolve().parent
RESULTS = TABLES.parents[1] / "tests" / "benchmarks" / "results"
TOLERANCE = 1e-3  # of compare_eigensolvers.py


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """In Markdown; the first column is of words, the others are of numbers."""
    head = list(head)
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "".join("| " + " | ".join(str(cell) for cell in line) + " |\n" for line in lines)


def machine_line(machine: Json, **more: object) -> str:
    """One line that says what was measured on."""
    gpu = machine.get("gpu", {}).get("name")
    parts = [gpu] if gpu else []
    parts.append(f"{machine['processor']}, {machine['threads']} thread{'s' * (machine['threads'] != 1)}")
    parts += [f"torch {machine['torch']}", f"Python {machine['python']}"]
    parts += [f"{name} {version}" for name, version in machine.get("versions", {}).items()]
    about = {
        "dynloss_ext": machine.get("dynloss_ext"),
        "commit": machine.get("commit"),
        "on": machine.get("date"),
    } | more
    parts += [f"{name} {value}" for name, value in about.items() if value]
    return f"*Machine: {'; '.join(parts)}.*\n"


def columns(rows: list[Json]) -> list[str]:
    """The keys of all rows, in the order of their first appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))


def loss_cpu(result: Json, path: Path) -> str:
    cases = result["cases"]
    names = columns(list(cases.values()))
    times = {name: [row.get(name) for row in cases.values()] for name in names}
    times = {name: [x if isinstance(x, float) else None for x in row] for name, row in times.items()}
    figures.bars(path.with_suffix(".png"), list(cases), times, result["unit"])
    image = path.with_name(f"{path.stem}_ratios.png")
    figures.ratios(image, cases, [name for name in ("eager", "compile") if name in names])
    rows = ([case, *(number(x[i]) if x[i] is not None else "" for x in times.values())] for i, case in enumerate(cases))
    text = f"![Time of PyTorch eager and compile over ours, by shape]({image.name})\n\n"
    return (
        text
        + f"![Microseconds by shape]({path.stem}.png)\n\n{table(['logits', *names], rows)}\n"
        + machine_line(result["machine"], instructions=result["machine"].get("instruction_set"))
    )


def eigensolvers(result: Json, path: Path) -> str:
    parts = []
    for problem, run in result.items():
        solvers = run["solvers"]
        image = path.with_name(f"{path.stem}_{problem}.png")
        milliseconds = [1e3 * solver["cpu_seconds_median"] for solver in solvers.values()]
        figures.bars(image, list(solvers), {"median milliseconds per state": milliseconds}, "milliseconds")
        rows = [
            [name, f"{s['products']:.1f}", number(1e3 * s["cpu_seconds_median"]), f"{s['worst_error']:.0e}"]
            for name, s in solvers.items()
        ]
        settings, overhead = run["settings"], run["driver"]["overhead_median"]
        beyond = f"{overhead:.1%}" if overhead > 0 else "less than the noise of this comparison"
        parts.append(
            f"### {problem}: {run['parameters']:,} parameters, {settings['dtype']}, {settings['states']} states\n\n"
            f"![Milliseconds per state]({image.name})\n\n"
            f"{table(['solver', 'products', 'ms', 'worst relative error'], rows)}\n"
            f"A product takes {number(1e3 * run['driver']['product_seconds_median'])} ms; what the driver costs beyond"
            f" its products is {beyond} of them.\n\n{machine_line(run['machine'])}"
        )
    return "\n".join(parts)


def contests(cells: list[Json], ours: Iterable[str], tolerance: float, peers: Callable[[str], bool]) -> list[Json]:
    """The cells in which any of ours and any of the peers is right, and by how much time the best of ours is longer."""
    found = []
    for cell in cells:
        right = {
            name: solver["seconds_min"]
            for name, solver in cell["solvers"].items()
            if solver and "failed" not in solver and solver["worst_error"] <= tolerance
        }
        own = [seconds for name, seconds in right.items() if name in ours]
        theirs = [seconds for name, seconds in right.items() if name not in OURS and peers(name)]
        if own and theirs:
            found.append(cell | {"ratio": min(own) / min(theirs)})
    return found


OURS = ("EigenTracker (warm)", "eigsh (cold)")


def verdict(cells: list[Json], tolerance: float) -> str:
    """Who is the fastest where, in words."""

    def told(contest: list[Json]) -> str:
        won, lost = ([cell for cell in contest if (cell["ratio"] <= 1) is is_won] for is_won in (True, False))
        best = max(1 / cell["ratio"] for cell in won)
        text = f"in {len(won)} of {len(contest)}, by up to {number(best)} times"
        if lost:
            by = ", ".join(
                f"{cell['product']} {cell['parameters']:,} k = {cell['k']} by {cell['ratio'] - 1:.0%}" for cell in lost
            )
            text += f"; the others are lost: {by}"
        return text

    warm = contests(cells, OURS, tolerance, lambda name: True)
    cold = contests(cells, OURS[1:], tolerance, lambda name: "(warm)" not in name)
    missed = [cell for cell in cells if cell["solvers"][OURS[1]]["worst_error"] > tolerance]
    return (
        f"Of the cases in which some value of ours and of a peer is right, the tracker or `eigsh` is the fastest"
        f" {told(warm)}. From nothing, `eigsh` with its audit against all that know no earlier state: the fastest"
        f" {told(cold)}. `eigsh` is off by more than the tolerance in {len(missed)} of {len(cells)}.\n"
    )


def eigensolver_grid(result: Json, path: Path) -> str:
    run = result["grid"]
    parts = []
    for cost in ("cheap", "dear"):
        cases = [row for row in run["solvers"].values() if row["product"] == cost]
        names = columns([row["solvers"] for row in cases])
        rows = []
        for case in sorted(cases, key=lambda row: (row["parameters"], row["k"])):
            found = {name: s for name, s in case["solvers"].items() if s and "failed" not in s}
            right = [s["seconds_min"] for s in found.values() if s["worst_error"] <= TOLERANCE]
            cells = [f"{case['parameters']:,}", case["k"]]
            for name in names:
                if name not in found:
                    cells.append("failed" if name in case["solvers"] else "")
                    continue
                cell = number(1e3 * found[name]["seconds_min"])
                wrong = found[name]["worst_error"] > TOLERANCE
                cells.append(f"({cell})" if wrong else f"**{cell}**" if cell == number(1e3 * min(right)) else cell)
            rows.append(cells)
        parts.append(f"{cost.capitalize()} products:\n\n{table(['parameters', 'k', *names], rows)}")
    if large := [
        row for row in run["solvers"].values() if any("peak_bytes" in (s or {}) for s in row["solvers"].values())
    ]:
        parts.append("Peak memory, in vectors of P numbers, with cheap products:\n\n" + _peaks(large))
    settings = run["settings"]
    text = f"![Time and peak memory against parameters](../../tests/benchmarks/results/{path.stem}.png)\n\n"
    text += verdict(list(run["solvers"].values()), TOLERANCE) + "\n" + "\n".join(parts)
    earlier: dict[str, list[str]] = {}
    for cell in run["solvers"].values():
        if (commit := cell.get("commit")) not in (None, run["machine"]["commit"]):
            earlier.setdefault(commit, []).append(f"{cell['product']} {cell['parameters']:,} k = {cell['k']}")
    for commit, cases in earlier.items():
        text += f"\nOf commit {commit}: {', '.join(cases)}.\n"
    return text + f"\n*{settings['dtype']}.* {machine_line(run['machine'])}"


def _peaks(cells: list[Json]) -> str:
    names = columns([cell["solvers"] for cell in cells])
    rows = []
    for cell in sorted(cells, key=lambda cell: (cell["parameters"], cell["k"])):
        peaks = [(cell["solvers"].get(name) or {}).get("peak_bytes") for name in names]
        shown = (f"{peak / 4 / cell['parameters']:.0f}" if peak else "" for peak in peaks)  # of float32
        rows.append([f"{cell['parameters']:,}", cell["k"], *shown])
    return table(["parameters", "k", *names], rows)


def products(result: Json, path: Path) -> str:
    solvers = ["ours", "SciPy", "SciPy ncv=24"]
    rows = (
        [name, *(f"{row[s][0]} ({row[s][1]:.0e})" for s in solvers), f"{row['status']}, {row['miss_probability']:.2f}"]
        for name, row in result.items()
    )
    return table(["eigenvalues", *solvers, "status and miss probability of ours"], rows)


def ensembles(result: Json, path: Path) -> str:
    rows = result["results"]
    names = columns([row["microseconds"] for row in rows])
    times = {name: [row["microseconds"].get(name) for row in rows] for name in names}
    figures.bars(path.with_suffix(".png"), [row["title"] for row in rows], times, "microseconds")
    cells = ([r["title"], *(number(t[i]) if t[i] else "" for t in times.values())] for i, r in enumerate(rows))
    text = f"![Microseconds]({path.stem}.png)\n\n{table(['', *names], cells)}\n"
    if costs := result.get("scaling"):
        image = path.with_name(f"{path.stem}_scaling.png")
        figures.scaling(image, costs)
        text += f"![Cost of a step against members, hidden units and points]({image.name})\n\n"
    for axis, times_of in result.get("scaling", {}).items():
        row = [f"µs per step over {axis}", *map(number, times_of.values())]
        text += table([axis, *times_of], [row]) + "\n"
    return text + machine_line(result["machine"])


def vmap(result: Json, path: Path) -> str:
    rows = (
        [row["members"], row["width"], row["samples"], *map(number, row["milliseconds"].values())]
        for row in result["results"]
    )
    head = ["members", "width", "images", "vmap, ms", "one by one (`vmap=False`), ms"]
    return f"{table(head, rows)}\n{machine_line(result['machine'])}"


def basis_sizes(result: Json, path: Path) -> str:
    """Of each size the time, and in brackets the products."""
    names = list(result["results"][0]["products"])
    rows = (
        [f"{row['product']} {row['parameters']:,}", row["k"]]
        + [f"{number(row['milliseconds'][name])} ({row['products'][name]})" for name in names]
        for row in result["results"]
    )
    return f"{table(['parameters', 'k', *names], rows)}\n{machine_line(result['machine'])}"


def memory(result: Json, path: Path) -> str:
    rows = (
        [
            run["max_basis"],
            run["products"],
            f"{run['peak_bytes'] / 1e9:.2f}",
            f"{run['added_vectors']:.1f}",
            run["bound_vectors"],
        ]
        for run in result["eigsh"]
    )
    head = ["max_basis", "products", "peak, GB", "vectors of P numbers added", "the docstring's bound"]
    text = f"{result['parameters']:,} parameters, k = {result['k']}.\n\n{table(head, rows)}"
    return text + (f"\n{machine_line(result['machine'])}" if "machine" in result else "")


def shard_basis(result: Json, path: Path) -> str:
    whole, parts = result["whole"], result["processes"]
    first = parts[0]
    rows = (
        [
            f"{part['rank']}",
            f"{part['entries']:,}",
            f"{part['basis_bytes'] / 1e6:.0f}",
            f"{part['peak_bytes'] / 1e6:.0f}",
            f"{part['messages_per_product']:.1f}",
            part["largest_message_bytes"],
            f"{part['seconds_per_product']:.1f}",
        ]
        for part in parts
    )
    head = [
        "process",
        "parameters",
        "basis, MB",
        "process at most, MB",
        "messages a product",
        "largest, bytes",
        "s a product",
    ]
    length, error = number(whole["product_length"]), f"{whole['product_error']:.0e} (noise: {first['noise']:.0e})"
    return (
        f"{result['parameters']:,} parameters. λ₁ = {first['values'][0]:.4g} with a residual of"
        f" {first['residuals'][0]:.1g} after {first['num_hvp']} products; of the whole model by recorded products"
        f" {whole['values'][0]:.4g}. A product with a random unit vector, of length {length}, is {error} from"
        f" the recorded one.\n\n{table(head, rows)}\n{machine_line(result['machine'])}"
    )


def gpu_check(result: Json, path: Path) -> str:
    stages = result["stages"]
    text = ""
    if kernels := stages.get("kernels", {}).get("numbers", {}).get("rows"):
        shares: dict[str, dict[int, float]] = {}
        for name, row in kernels.items():
            size, dtype, reduction = [*name.split("-"), ""][:3]
            if reduction == "sum" and 2e8 < row.get("bytes", 0) < 1e9:
                shares.setdefault(dtype, {})[int(size.split("x")[1])] = row["of_copy"]
        classes = sorted({c for row in shares.values() for c in row})
        if classes:
            cells = ([dtype, *(f"{row[c]:.2f}" if c in row else "" for c in classes)] for dtype, row in shares.items())
            text += (
                "Loss and gradient as a part of what a copy of the same bytes reaches, by the number of classes:\n\n"
            )
            text += table(["classes", *map(str, classes)], cells) + "\n"
            image = path.with_name(f"{path.stem}_kernels.png")
            figures.shares_of_bandwidth(image, shares)
            text += f"![Part of a copy's bandwidth]({image.name})\n\n"
    if contenders := stages.get("contenders", {}).get("numbers", {}).get("rows"):
        losses = {n: {c: r["us"] for c, r in row.items() if isinstance(r, dict)} for n, row in contenders.items()}
        losses = {name: row for name, row in losses.items() if row}
        names = columns(list(losses.values()))
        image = path.with_name(f"{path.stem}_contenders.png")
        figures.bars(
            image, list(losses), {c: [row.get(c) for row in losses.values()] for c in names}, "microseconds, median"
        )
        cells = ([n, *(number(row[c]) if c in row else "" for c in names)] for n, row in losses.items())
        text += (
            f"Forward and backward pass, medians:\n\n![Microseconds]({image.name})\n\n{table(['', *names], cells)}\n"
        )
    if training := stages.get("training", {}).get("numbers", {}).get("images_per_second"):
        rows = ([net, way, f"{r['median']:,.0f}"] for net, ways in training.items() for way, r in ways.items())
        text += "Training on made-up images:\n\n" + table(["network", "how", "images/s"], rows) + "\n"
    if graphs := stages.get("graphs", {}).get("numbers", {}).get("rows"):
        rows = (
            [name, f"{r['plain_per_second']:,.0f}", f"{r['replayed_per_second']:,.0f}", f"{r['speedup']:.1f}"]
            for name, r in graphs.items()
            if "speedup" in r
        )
        text += "Steps and products replayed as CUDA graphs:\n\n"
        text += table(["", "plain, 1/s", "replayed, 1/s", "ratio"], rows) + "\n"
        if update := graphs.get("tracker update"):
            ratio, target = update["update_over_graphed_products"], update["target"]
            text += f"A tracker's update took {ratio:.1f} times its products, replayed; {target} was aimed at.\n\n"
    if passed := stages.get("correctness", {}).get("numbers", {}).get("passed"):
        text += f"Tests passed on this card: {passed}.\n\n"
    outcome = ", ".join(f"{name} {stage['result']}" for name, stage in stages.items())
    more = {
        "driver": result["machine"].get("driver"),
        "commit": result.get("commit"),
        "tree": result.get("tree"),
        "on": result.get("started", "")[:10],
    }
    return f"{text}Stages: {outcome}.\n\n{machine_line(result['machine'], **more)}"


def noise_floors(result: Json, path: Path) -> str:
    rows = (
        [
            f"{row['network']}, P = {row['parameters']:,}",
            row["precision"],
            *(f"{row[name]:.0e}" if row[name] else "0" for name in ("noise", "residual", "error")),
            row["products"],
            row["status"],
        ]
        for row in result["rows"]
    )
    head = ["network", "arithmetic", "noise of a product", "residual reached", "error of λ₁", "products", "status"]
    return f"{table(head, rows)}\n{machine_line(result['machine'])}"


def differences(result: Json, path: Path) -> str:
    rows = (
        [
            f"{row['network']}, P = {row['parameters']:,}",
            row["precision"],
            row["order"],
            *(f"{row[name]:.0e}" for name in ("error", "noise", "eigenvalue", "residual")),
            row["status"],
            " + ".join(map(str, row["gradients"])),
        ]
        for row in result["rows"]
    )
    head = ["network", "arithmetic", "order", "error of a product", "its `noise`", "error of λ₁", "residual", "status"]
    return f"{table([*head, 'gradients'], rows)}\n{machine_line(result['machine'])}"


def torch_derivatives(result: Json, path: Path) -> str:
    def cell(value: float | str) -> str:
        if isinstance(value, str):
            return value
        return "right" if value < 1e-6 else f"**wrong by {value:.0%}**"

    rows = ([layer, *map(cell, row.values())] for layer, row in result["rows"].items())
    return f"{table(['layer', *columns(list(result['rows'].values()))], rows)}\n{machine_line(result['machine'])}"


RENDERERS: dict[str, Callable[[Json, Path], str]] = {
    r"loss_cpu.*": loss_cpu,
    r"eigensolvers.*": eigensolvers,
    r"eigensolver_grid.*": eigensolver_grid,
    r"products": products,
    r"ensembles.*": ensembles,
    r"vmap.*": vmap,
    r"basis_sizes.*": basis_sizes,
    r"memory_.*": memory,
    r"shard_basis.*": shard_basis,
    r"gpu_check_.*": gpu_check,
    r"differences": differences,
    r"noise_floors": noise_floors,
    r"torch_derivatives": torch_derivatives,
}


def write(folder: Path) -> None:
    """A page and its figures for each file of results.

    A page that says the same as before is left alone, for a build to skip.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for source in sorted([*RESULTS.glob("*.json"), *TABLES.glob("*.json")]):
        render = next(render for pattern, render in RENDERERS.items() if re.fullmatch(pattern, source.stem))
        page = folder / f"{source.stem}.md"
        text = render(json.loads(source.read_text()), page)
        if not page.exists() or page.read_text() != text:
            page.write_text(text)


def draw_grid(source: Path) -> None:
    """The picture beside a grid's results, which says of which: their SHA-256."""
    content = source.read_bytes()
    cells, digest = json.loads(content)["grid"]["solvers"], hashlib.sha256(content).hexdigest()
    figures.eigensolver_grid(source.with_suffix(".png"), list(cells.values()), TOLERANCE, digest)


if __name__ == "__main__":
    draw_grid(Path(sys.argv[2])) if sys.argv[1] == "grid" else write(Path(sys.argv[1]))
