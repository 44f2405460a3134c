"""Figures show the arrays they are given, refuse arrays that do not fit, and can be saved."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from dynloss_ext import plot, spectral_density
from dynloss_ext.instability import Instability, PeriodChange, PeriodSegment

CUT = Path(__file__).parent / "data" / "spiral_reference_5000.npz"


@pytest.fixture(scope="module")
def run():
    with np.load(CUT) as data:
        rows = np.arange(len(data["loss"]))
        phase = rows / 5000
        return {
            "step": rows,
            "weights": np.stack([1 + phase, 1 - phase / 2, 1 - phase / 2], axis=1),
            "weighted_loss": data["weighted_loss"],
            "loss": data["loss"],
            "accuracy": data["accuracy"],
            "eig_step": data["eig_step"],
            "eigenvalues": data["eig_top5"][:, :3],
        }


WINDOWS = [Instability(0, 288, 0.6, 0.9), Instability(4223, 4999, 2.4, 1.6)]


def draw(run, **options):
    arguments = {**run, "instabilities": WINDOWS, "limit": 2.0, **options}
    return plot.trajectory(arguments.pop("step"), **arguments)


def rendered(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=40)
    return buffer.getvalue()


def labelled_ticks(axis):
    """Values of the labelled ticks in sight, once drawn."""
    axis.figure.draw_without_rendering()
    low, high = axis.get_ylim()
    ticks = zip(axis.get_yticks(), axis.get_yticklabels(), strict=True)
    return sorted(value for value, label in ticks if low <= value <= high and label.get_text())


def legend(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


def is_inside(axis, artist):
    figure = axis.figure
    figure.draw_without_rendering()
    box = artist.get_window_extent()
    return (
        figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1
    )


def lines_with_label(axis, label):
    return [line for line in axis.get_lines() if line.get_label() == label]


def test_trajectory_draws_the_recorded_arrays(run):
    figure = draw(run)
    assert isinstance(figure, Figure)
    assert len(figure.axes) == 5
    weights, loss, change, accuracy, eigen = figure.axes
    assert len(lines_with_label(weights, "0")) == 1
    np.testing.assert_array_equal(lines_with_label(loss, "dynamical loss $F$")[0].get_ydata(), run["weighted_loss"])
    np.testing.assert_array_equal(change.get_lines()[0].get_ydata(), np.diff(run["weighted_loss"]))
    np.testing.assert_array_equal(accuracy.get_lines()[0].get_ydata(), run["accuracy"])
    for index in range(3):
        (line,) = lines_with_label(eigen, f"$\\lambda_{{{index + 1}}}$")
        np.testing.assert_array_equal(line.get_xdata(), run["eig_step"])
        np.testing.assert_array_equal(line.get_ydata(), run["eigenvalues"][:, index])
    assert rendered(figure)


def test_trajectory_marks_starts_stops_threshold_and_limit(run):
    eigen = draw(run).axes[4]
    at = {
        colour: [line.get_xdata()[0] for line in eigen.get_lines() if line.get_color() == colour]
        for colour in (plot.START_COLOUR, plot.STOP_COLOUR)
    }
    assert at[plot.START_COLOUR] == [0, 4223]
    assert at[plot.STOP_COLOUR][-2:] == [288, 4999]
    (threshold,) = lines_with_label(eigen, "threshold 1.38")  # the mean of 0.6, 0.9, 2.4 and 1.6
    assert threshold.get_ydata()[0] == pytest.approx(1.375)
    assert lines_with_label(draw(run, threshold=2.02).axes[4], "threshold 2.02")
    (limit,) = lines_with_label(eigen, "stability limit 2")
    assert limit.get_ydata()[0] == 2


def test_zoom_adds_a_column_with_the_rows_inside(run):
    figure = draw(run, zoom=(4200, 4400), ntk=np.ones(len(run["eig_step"])))
    assert len(figure.axes) == 12
    zoomed = [axis for axis in figure.axes if axis.get_xlim() == (4200, 4400)]
    assert len(zoomed) == 6
    (line,) = lines_with_label(zoomed[1], "dynamical loss $F$")
    np.testing.assert_array_equal(line.get_ydata(), run["weighted_loss"][4200:4401])
    assert rendered(figure)


@pytest.mark.parametrize("panels", [["weighted_loss"], ["weights", "weighted_loss", "accuracy"]])
def test_names_of_changes_do_not_overlap(run, panels):
    """Nor do they leave the panel: of many at nearly one step there are fewer names than lines."""

    def texts(steps, periods=(2, 4, 2, 1, 2, None)):
        changes = [PeriodChange(step, periods[i % 6], periods[(i + 1) % 6]) for i, step in enumerate(steps)]
        given = {name: run[name] for name in panels}
        figure = plot.trajectory(run["step"], **given, zoom=(3500, 4999), changes=changes[::-1], title="a")
        (axis,) = [axis for axis in figure.axes if axis.texts]
        figure.draw_without_rendering()
        boxes = [text.get_window_extent() for text in axis.texts]
        for i, box in enumerate(boxes):
            assert axis.bbox.y0 <= box.y0 and box.y1 <= axis.bbox.y1
            assert not any(box.overlaps(other) for other in boxes[:i])
        return [(text.get_text(), text.get_position()[1]) for text in axis.texts]

    assert [name for name, _ in texts([4200, 4220])] == ["2→4", "4→2"]
    assert texts([4200, 4220])[1][1] < 0.9
    assert texts([3600, 4200, 4800]) == [("2→4", 0.98), ("4→2", 0.98), ("2→smooth", 0.98)]
    assert len(texts([4000, 4010, 4020, 4030])) >= 3
    assert 3 <= len(texts(range(4000, 4012))) < 12


def test_trajectory_without_curvature_windows_or_plain_loss(run):
    bare = {name: run[name] for name in ("weights", "weighted_loss", "accuracy")}
    assert len(plot.trajectory(run["step"], **bare).axes) == 4


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("zoom", [None, (100, 300)])
@pytest.mark.parametrize(
    ("given", "labels"),
    [
        ({"weights"}, [r"class weight $\Gamma_i$"]),
        ({"loss"}, ["loss"]),
        ({"weighted_loss"}, ["loss", "$F(t)-F(t-1)$"]),
        ({"accuracy", "loss"}, ["loss", "accuracy"]),
        ({"eig_step", "eigenvalues"}, [r"Hessian $\lambda$"]),
        ({"eig_step", "ntk"}, [r"NTK $\lambda_{\max}$"]),
        ({"accuracy", "eig_step", "ntk"}, ["accuracy", r"NTK $\lambda_{\max}$"]),
    ],
)
def test_trajectory_draws_what_it_is_given(run, given, labels, zoom):
    values = {**run, "ntk": run["eigenvalues"][:, 0]}
    step = (run["step"],) if given & {"weights", "loss", "weighted_loss", "accuracy"} else ()
    options = {"instabilities": WINDOWS, "limit": 2.0, "threshold": 1.5, "title": "a", "zoom": zoom}
    figure = plot.trajectory(*step, **{name: values[name] for name in given}, **options)
    columns = 2 if zoom else 1
    assert [axis.get_ylabel() for axis in figure.axes[::columns]] == labels
    assert all(axis.get_lines()[0].get_xdata().size for axis in figure.axes)
    assert figure.axes[-columns].get_xlim()[1] == (step[0] if step else run["eig_step"])[-1]
    if given == {"loss"}:  # in the zoom too, where F alone is drawn if there is one
        assert all(lines_with_label(axis, "plain cross-entropy") for axis in figure.axes)
    assert rendered(figure)


def test_trajectory_of_nothing_is_refused(run):
    for arguments in ((), (run["step"],)):
        with pytest.raises(ValueError, match=r"weights, weighted_loss, .* ntk: expected at least one, got none"):
            plot.trajectory(*arguments, eigenvalues=())
    with pytest.raises(ValueError, match="eigenvalues: expected 0 rows, got 200"):
        plot.trajectory(run["step"], loss=run["loss"], eigenvalues=run["eigenvalues"])


def test_the_change_is_named_by_the_steps_between_records():
    loss = np.linspace(1, 2, 5)
    for step, label in ((range(0, 50, 10), "$F(t)-F(t-10)$"), ([0, 1, 5, 6, 9], r"$\Delta F$ between records")):
        assert plot.trajectory(step, weighted_loss=loss).axes[1].get_ylabel() == label


@pytest.mark.filterwarnings("error")
def test_values_between_gaps_are_dots():
    values = np.array([1.0, np.nan, 2.0, 3.0, np.nan, 4.0, np.inf, 5.0])
    curves = {"weights": np.stack([values, np.ones(8)], 1), "accuracy": values, "loss": values, "weighted_loss": values}
    records = {"eig_step": range(8), "eigenvalues": values[:, None], "ntk": values}
    figure = plot.trajectory(range(8), **curves, **records)
    for axis in (figure.axes[i] for i in (0, 1, 3, 4, 5)):
        line = axis.get_lines()[0]
        assert line.get_marker() == "." and line.get_markevery() == [0, 5, 7]
    assert figure.axes[0].get_lines()[1].get_marker() == "None"
    assert rendered(figure)


def test_stability_limit_may_change_along_the_run(run):
    limit = np.linspace(4, 1, len(run["step"]))
    eigen = draw(run, limit=limit, zoom=(100, 200)).axes[8]
    (line,) = lines_with_label(eigen, "stability limit")
    np.testing.assert_array_equal(line.get_ydata(), limit)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("change", "ticks"),
    [
        ([-2e-3, -1.5e-3], [-1e-3, 0]),
        ([3e-3, 8e-3], [0, 1e-3]),
        ([-0.02, 0.02], [-1e-2, -1e-3, 0, 1e-3, 1e-2]),
        ([-3.0, 5.0], [-1, -1e-2, 0, 1e-2, 1]),
        ([30.0, 50.0], [0, 1e-1, 10]),
        ([5e-2, 2e3], [0, 1, 1e3]),
        ([-2e8, 3e5, np.inf, np.nan], [-1e8, -1e4, -1, 0, 1, 1e4]),
    ],
)
def test_ticks_of_the_change_follow_its_range(change, ticks):
    loss = 1e9 + np.cumsum([0.0, *change])
    size = len(loss)
    figure = plot.trajectory(range(size), weights=np.ones((size, 1)), weighted_loss=loss, accuracy=np.ones(size))
    np.testing.assert_allclose(labelled_ticks(figure.axes[2]), ticks)


@pytest.mark.parametrize("slope", [0.0, -1e-9, 4e-4])
def test_a_calm_run_has_a_linear_scale_of_changes(slope):
    loss = 0.5 + slope * np.arange(20)
    figure = plot.trajectory(range(20), weights=np.ones((20, 1)), weighted_loss=loss, accuracy=loss)
    assert figure.axes[2].get_yscale() == "linear"
    assert len(labelled_ticks(figure.axes[2])) >= 2


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("loss", "scale"),
    [(0.0, "linear"), (-1.0, "linear"), ([-1.0, 1.0], "linear"), (np.nan, "linear"), ([0.0, 1.0], "log")],
)
def test_a_loss_that_is_not_positive_has_a_linear_scale(loss, scale):
    ones = np.ones(2)
    for curves in ({"weighted_loss": loss}, {"weighted_loss": ones, "loss": loss}):
        curves = {name: np.broadcast_to(value, 2) for name, value in curves.items()}
        figure = plot.trajectory([0, 1], weights=np.ones((2, 1)), accuracy=ones, **curves)
        assert figure.axes[1].get_yscale() == scale
        assert rendered(figure)


@pytest.mark.parametrize("zoom", [None, (100, 150)])
def test_ten_classes_and_ten_eigenvalues_are_told_apart(zoom):
    steps = np.arange(200)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    rows = np.ones((200, 10)) * np.arange(10)
    curves = {"weights": rows, "weighted_loss": 1 + steps, "accuracy": steps, "eigenvalues": rows}
    options = {"class_names": names, "limit": 2.0, "threshold": 1.9, "zoom": zoom}
    axes = plot.trajectory(steps, eig_step=steps, **curves, **options).axes
    weights, eigen = axes[0], axes[8 if zoom else 4]
    assert [label for label in legend(weights) if label != "class"] == names
    assert legend(eigen)[:10] == [f"$\\lambda_{{{index}}}$" for index in range(1, 11)]
    for axis in (weights, eigen):
        assert len({line.get_color() for line in axis.get_lines()[:10]}) == 10
        assert is_inside(axis, axis.get_legend())


def test_more_curves_than_colours_differ_in_line_style():
    rows = np.ones((4, 25))
    figure = plot.trajectory(range(4), weights=rows, weighted_loss=np.ones(4), accuracy=np.ones(4))
    assert len({(line.get_color(), line.get_linestyle()) for line in figure.axes[0].get_lines()}) == 25


def test_tensors_are_accepted(run):
    tensors = {name: torch.from_numpy(np.asarray(value)) for name, value in run.items()}
    assert len(draw(tensors).axes) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accuracy": np.zeros(7)}, "accuracy: expected 5000 rows, got 7"),
        ({"eigenvalues": np.zeros(200)}, r"eigenvalues: expected 2 dimensions, got shape \(200,\)"),
        ({"eigenvalues": np.zeros((3, 3))}, "eigenvalues: expected 200 rows, got 3"),
        ({"limit": np.zeros(3)}, "limit: expected 5000 rows, got 3"),
        ({"class_names": ["a", "b"]}, "class_names: expected 3 names, got 2"),
        ({"zoom": (150, 100)}, r"zoom: expected first <= last .* run \(0 to 4999\), got \(150.*, 100.*\)"),
        ({"zoom": (6000, 7000)}, r"zoom: expected .* got \(6000.*, 7000.*\)"),
        ({"zoom": (0.2, 0.8)}, r"zoom: expected .* got \(0.2, 0.8\)"),
        ({"zoom": (0, np.inf)}, r"zoom: expected .* got \(0.0, inf\)"),
        ({"zoom": (np.nan, 100)}, r"zoom: expected .* got \(nan, 100.0\)"),
        ({"zoom": (0, 1, 2)}, "zoom: expected 2 rows, got 3"),
        ({"guides": ([0, 1], np.zeros((3, 2)))}, "guides: expected 2 rows, got 3"),
    ],
)
def test_trajectory_refuses_arrays_that_do_not_fit(run, change, message):
    with pytest.raises(ValueError, match=message):
        draw(run, **change)


def test_a_zoom_into_a_run_without_steps_is_refused():
    with pytest.raises(ValueError, match=r"zoom: expected .* run \(none\), got \(0, 1\)"):
        plot.trajectory([], weights=np.ones((0, 1)), weighted_loss=[], accuracy=[], zoom=(0, 1))


def test_what_is_not_a_number_is_refused_by_name(run):
    for name in ("weights", "weighted_loss", "accuracy", "loss"):
        with pytest.raises(TypeError, match=f"^{name}: expected real numbers, got dtype "):
            draw(run, **{name: run[name].astype(str)})
    with pytest.raises(TypeError, match="values: expected real numbers, got dtype object"):
        plot.phase_diagram([1], [2], [[None]])
    with pytest.raises(TypeError, match="density: expected real numbers, got dtype <U1"):
        plot.spectral_density([1.0], ["a"])
    with pytest.raises(TypeError, match="loss: expected real numbers, got dtype complex128"):
        plot.bifurcation([0], [1j])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("start", [0, 7])
def test_trajectory_of_a_single_step_is_a_dot(start):
    one = {"weights": np.ones((1, 3)), "weighted_loss": [0.5], "accuracy": [0.9], "loss": [0.5]}
    figure = plot.trajectory([start], **one, eig_step=[start], eigenvalues=[[2.0]], zoom=(start, start))
    for axis in figure.axes:
        assert axis.get_xlim() == (start - 0.5, start + 0.5)
        assert all(line.get_marker() == "." for line in axis.get_lines() if len(line.get_xdata()) == 1)
    assert rendered(figure)
    assert rendered(plot.bifurcation([start], [0.5]))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_diverged_run_can_be_drawn(run, value):
    loss = np.where(run["step"] < 4900, run["weighted_loss"], value)
    eigenvalues = np.where(run["eig_step"][:, None] < 4900, run["eigenvalues"], value)
    assert rendered(draw(run, weighted_loss=loss, eigenvalues=eigenvalues))


def test_bfloat16_is_drawn():
    ones = torch.ones(4, dtype=torch.bfloat16)
    curves = {"weights": ones[:, None], "weighted_loss": ones, "accuracy": ones}
    assert rendered(plot.trajectory(torch.arange(4), **curves, limit=2 * ones[0]))
    assert rendered(plot.trajectory(torch.arange(4), **curves, limit=2 * ones))
    assert rendered(plot.phase_diagram([1, 2], [3, 4], ones.reshape(2, 2)))
    assert rendered(plot.spectral_density(torch.arange(4), ones, step=ones[0], eigenvalues=ones))
    assert rendered(plot.bifurcation(torch.arange(4), ones))
    assert rendered(plot.layer_spectra({"a": ones}))


def test_phase_diagram_puts_amplitudes_in_rows():
    values = np.array([[0.70, 0.72, 0.74], [0.71, np.nan, 0.79]])
    figure = plot.phase_diagram([10, 100, 1000], [2, 50], values, baseline=0.73, spread=np.full((2, 3), 0.01))
    axis = figure.axes[0]
    np.testing.assert_array_equal(np.asarray(axis.get_images()[0].get_array()), values)
    assert [text.get_text() for text in axis.get_xticklabels()] == ["10", "100", "1000"]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["2", "50"]
    written = {text.get_position(): text.get_text() for text in axis.texts}
    assert written[(2, 1)] == "0.790\n±0.010"
    assert (1, 1) not in written  # no run there
    assert axis.get_images()[0].norm.vmin == pytest.approx(0.67)  # symmetric about the baseline
    assert rendered(figure)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("baseline", [None, np.nan, np.inf])
def test_phase_diagram_without_any_run_can_be_drawn(baseline):
    for nothing in (np.nan, np.inf):
        assert rendered(plot.phase_diagram([1, 2], [3], np.full((1, 2), nothing), baseline=baseline))


def test_a_baseline_that_is_not_finite_is_none():
    values = [[0.7, 0.8]]
    plain, nan = (plot.phase_diagram([1, 2], [3], values, baseline=baseline) for baseline in (None, np.nan))
    images = [figure.axes[0].get_images()[0] for figure in (plain, nan)]
    assert images[1].get_clim() == images[0].get_clim() == (0.7, 0.8)
    assert images[1].get_cmap() == images[0].get_cmap()
    assert not nan.axes[1].texts  # no A = 1 on the bar


def written(values, **options):
    values = np.atleast_2d(values)
    axis = plot.phase_diagram(range(values.shape[1]), range(values.shape[0]), values, **options).axes[0]
    return {text.get_position()[0]: text.get_text() for text in axis.texts}


def test_cells_hold_what_is_finite():
    spread = [[0.01, np.nan, 0.01, np.inf]]
    assert written([0.5, 0.6, np.inf, 0.7], spread=spread) == {0: "0.500\n±0.010", 1: "0.600", 3: "0.700"}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1.234e-5, "1.23e-5"),
        (0.00123, "0.001"),
        (0.1234, "0.123"),
        (1, "1.000"),
        (-1.234, "-1.23"),
        (9.999, "10.0"),
        (123.4, "123"),
        (12345.6, "12346"),
        (440377.153, "4.40e5"),
        (-1e300, "-1.00e300"),
    ],
)
def test_numbers_in_cells_fit_their_magnitude(value, text):
    assert written([value]) == {0: text}


def test_ticks_of_large_and_small_values_are_short():
    axis = plot.phase_diagram([0.5, 12000, 1e6, 1234567], [1e-5], np.ones((1, 4))).axes[0]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["0.5", "12000", "1e6", "1.23e6"]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["1e-5"]


def test_phase_diagram_refuses_a_transposed_map():
    with pytest.raises(ValueError, match="values: expected 2 rows, got 3"):
        plot.phase_diagram([10, 100, 1000], [2, 50], np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"spread: expected shape \(2, 3\), got \(2, 2\)"):
        plot.phase_diagram([10, 100, 1000], [2, 50], np.zeros((2, 3)), spread=np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"values: expected at least one period and one amplitude, got shape \("):
        plot.phase_diagram([], [1], np.empty((1, 0)))


def test_spectral_density_of_one_moment_and_of_several():
    grid = np.linspace(-1, 3, 50)
    density = np.exp(-(grid**2))
    single = plot.spectral_density(grid, density, stderr=0.1 * density, eigenvalues=[2.5])
    np.testing.assert_array_equal(single.axes[0].get_lines()[0].get_ydata(), density)
    several = plot.spectral_density(grid, np.stack([density, 2 * density]), step=[0, 1000])
    assert [len(axis.get_lines()) for axis in several.axes[:1]] == [2]
    assert len(several.axes) == 2  # and the colour bar of the steps
    assert rendered(single)
    assert rendered(several)


def test_spectral_density_numbers_its_rows_without_steps():
    grid = np.linspace(-1, 3, 50)
    figure = plot.spectral_density(grid, np.exp(-(grid**2)) * [[1], [2], [3]])
    axis, bar = figure.axes
    assert bar.get_ylabel() == "row"
    assert labelled_ticks(bar) == [0, 1, 2]
    mappable = bar._colorbar.mappable
    assert [line.get_color() for line in axis.get_lines()] == [tuple(mappable.to_rgba(row)) for row in range(3)]


@pytest.mark.parametrize("density", [[2.0], [np.nan, 2.0], [np.nan, 2.0, np.nan]])
def test_spectral_density_of_a_single_point_is_a_dot(density):
    axis = plot.spectral_density(np.arange(len(density)), density, stderr=np.ones(len(density))).axes[0]
    assert [line.get_marker() for line in axis.get_lines()] == ["."]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("probes", [1, 5])
def test_spectral_density_draws_its_own_result(probes):
    matrix = torch.randn(30, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = matrix + matrix.T
    options = {"n": 30, "dtype": torch.float64, "device": "cpu"}
    result = spectral_density(lambda v: matrix @ v, num_steps=10, num_probes=probes, **options)
    axis = plot.spectral_density(result, eigenvalues=[29.0], title="H").axes[0]
    (line, tick) = axis.get_lines()
    np.testing.assert_array_equal(line.get_xdata(), result.grid)
    np.testing.assert_array_equal(line.get_ydata(), result.density)
    assert tick.get_xdata()[0] == 29
    by_hand = plot.spectral_density(result.grid, result.density, stderr=result.stderr, eigenvalues=[29.0], title="H")
    assert rendered(axis.figure) == rendered(by_hand)
    for name in ("density", "stderr"):
        with pytest.raises(ValueError, match=f"{name}: expected that of the SpectralDensity, got another"):
            plot.spectral_density(result, **{name: result.density})
    with pytest.raises(TypeError, match="grid: expected a SpectralDensity, or points and a density, got Tensor alone"):
        plot.spectral_density(result.grid)


def test_spectral_density_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"grid: expected shape .* got \(3,\)"):
        plot.spectral_density(np.zeros(3), np.ones(4))
    with pytest.raises(ValueError, match=r"stderr: expected shape \(4,\), got \(3,\)"):
        plot.spectral_density(np.zeros(4), np.ones(4), stderr=np.ones(3))
    with pytest.raises(ValueError, match=r"stderr: expected shape \(2, 4\), got \(4,\)"):
        plot.spectral_density(np.zeros(4), np.ones((2, 4)), stderr=np.ones(4))
    with pytest.raises(ValueError, match="step: expected 2 rows, got 3"):
        plot.spectral_density(np.zeros(4), np.ones((2, 4)), step=[1, 2, 3])


@pytest.mark.parametrize(
    ("grid", "density", "message"),
    [
        ([], [], r"density: expected at least one point, got shape \(0,\)"),
        (np.zeros(5), np.empty((0, 5)), r"density: expected at least one point, got shape \(0, 5\)"),
        ([0.0, np.nan], [1.0, 1.0], "grid: expected finite points, got others"),
    ],
)
def test_spectral_density_without_a_point_is_refused(grid, density, message):
    with pytest.raises(ValueError, match=message):
        plot.spectral_density(grid, density)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("density", [[np.nan, np.nan], [0.0, 0.0], [1.0, np.inf], [np.nan, 1.0]])
def test_spectral_density_of_a_run_that_failed_can_be_drawn(density):
    figure = plot.spectral_density([0.0, 1.0], density)
    assert figure.axes[0].get_ylim() == pytest.approx((1e-7, 3))
    assert rendered(figure)


@pytest.mark.filterwarnings("error")
def test_spectral_density_shows_exact_eigenvalues_beyond_the_grid():
    grid = np.linspace(-1, 3, 50)
    for exact, (low, high) in (([7.5], (-1, 7.67)), ([-2.0], (-2.1, 3)), ([2.0, np.nan, np.inf], (-1, 3))):
        axis = plot.spectral_density(grid, np.exp(-(grid**2)), eigenvalues=exact).axes[0]
        assert axis.get_xlim() == pytest.approx((low, high))
    assert rendered(plot.spectral_density([1.0], [2.0]))


def test_bifurcation_colours_every_step_by_its_period(run):
    inside = run["step"] >= 4000
    step, loss = run["step"][inside], run["weighted_loss"][inside]
    segments = [PeriodSegment(4100, 4299, 1), PeriodSegment(4300, 4699, 2), PeriodSegment(4700, 4999, None)]
    seen = run["eig_step"] >= 4000
    curvature = {"eig_step": run["eig_step"][seen], "lambda_max": run["eigenvalues"][seen, 0]}
    figure = plot.bifurcation(step, loss, segments=segments, limit=2.0, **curvature)
    dots = figure.axes[0].get_lines()
    assert [len(line.get_xdata()) for line in dots] == [200, 400, 300, 100]  # the last: measured by nobody
    assert len({line.get_color() for line in dots}) == 4
    assert legend(figure.axes[0]) == ["smooth", "period 2", "chaos"]
    assert legend(figure.axes[1]) == ["stability limit 2"]
    np.testing.assert_array_equal(figure.axes[1].get_lines()[0].get_ydata(), curvature["lambda_max"])
    assert rendered(figure)
    assert len(plot.bifurcation(step, loss).axes) == 1
    with pytest.raises(ValueError, match="loss: expected 1000 rows, got 3"):
        plot.bifurcation(step, loss[:3])
    with pytest.raises(ValueError, match="lambda_max: expected 1 rows, got 0"):
        plot.bifurcation(step, loss, eig_step=[4000])


@pytest.mark.filterwarnings("error")
def test_bifurcation_names_every_colour_once():
    periods = [None, 16, 14, 12, 10, 8, 7, 6, 5, 4, 3, 2, 1]
    segments = [PeriodSegment(10 * index, 10 * index + 9, period) for index, period in enumerate(periods)]
    curvature = {"eig_step": [0, 129], "lambda_max": [1, 2], "limit": 2.0}
    axis = plot.bifurcation(range(130), np.ones(130), segments=segments, **curvature).axes[0]
    doublings = [f"period {period}" for period in (2, 4, 8, 16)]
    assert legend(axis) == ["smooth", *doublings, "other: 3, 5, 6, 7, 10, 12, 14", "chaos"]
    assert is_inside(axis, axis.get_legend())
    assert axis.get_window_extent().width > 0.8 * axis.figure.bbox.width
    one = plot.bifurcation(range(130), np.ones(130), segments=[PeriodSegment(0, 9, 3)])
    assert legend(one.axes[0]) == ["period 3"]


def test_layer_spectra_has_a_row_for_every_layer():
    spectra = {"first": torch.tensor([5.0, 0.1, -2e-3]), "second": [7.0, 0.0]}
    figure = plot.layer_spectra(spectra, whole=[8.0, 4.0])
    (axis,) = figure.axes
    assert [text.get_text() for text in axis.get_yticklabels()] == ["first", "second"]
    dots = [line for line in axis.get_lines() if line.get_marker() == "o"]
    np.testing.assert_array_equal(dots[0].get_xdata(), spectra["first"])
    np.testing.assert_array_equal(dots[1].get_ydata(), [1, 1])
    low, high = axis.get_xlim()
    assert low < -2e-3
    assert high > 8
    assert rendered(figure)
    assert rendered(plot.layer_spectra({"flat": [0.0, 0.0]}))
    with pytest.raises(ValueError, match="spectra: expected at least one layer, got none"):
        plot.layer_spectra({})
    with pytest.raises(ValueError, match="spectra\\['a'\\]: expected 1 dimension, got shape"):
        plot.layer_spectra({"a": np.zeros((2, 2))})


@pytest.mark.filterwarnings("error")
def test_layer_spectra_leaves_out_what_is_not_finite():
    figure = plot.layer_spectra({"a": [np.inf, 1.0, -3.0], "b": [np.nan]}, whole=[5.0, np.inf])
    (axis,) = figure.axes
    dots = [line.get_xdata().tolist() for line in axis.get_lines() if line.get_marker() == "o"]
    assert dots == [[1.0, -3.0], []]
    assert axis.get_xlim() == pytest.approx((-4.5, 7.5))
    assert rendered(figure)
