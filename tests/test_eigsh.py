"""eigsh on operators whose spectra are known."""

import math
import os
import signal
import threading
import warnings

import numpy as np
import pytest
import torch
from curvature_problems import Known, check_eigenpairs, dense_hessian, loss_of, mlp
from processes import run_python

from dynloss_ext import _C, ConvergenceWarning, HessianOperator, eigsh

pytestmark = pytest.mark.filterwarnings("error::dynloss_ext.ConvergenceWarning")


CLUSTER = (0.5 + 1e-3 * np.arange(200)).tolist()
SPECTRA = {
    "ghosts": [100.0, 10.0, 5.0, *CLUSTER],
    "triple": [7.0, 7.0, 7.0, *[0.1] * 20, *np.linspace(0, 0.09, 60)],
    "triple in a crowd": [7.0, 7.0, 7.0, *np.linspace(0, 6, 300)],
    "pair below the top": [9.0, 4.0, 4.0, *np.linspace(-1, 3, 300)],
    "nearly equal": [3.0, 3.0 - 1e-6, 3.0 - 2e-6, *np.linspace(-2, 2, 200)],
    "negative definite": [-0.1, -0.2, -0.3, *np.linspace(-9, -1, 100)],
    "rank two": [5.0, 2.0, *[0.0] * 80],
    "rank one of both signs": [5.0, -8.0, *[0.0] * 80],
    "zero": [0.0] * 50,
    "identity": [1.0] * 50,
    "wide": np.logspace(-8, 6, 120).tolist(),
    "three": [3.0, -1.0, 2.0],
}


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
@pytest.mark.parametrize("name", SPECTRA)
def test_known_spectra(name, which):
    operator = Known(SPECTRA[name])
    # Fourteen decades are not to be had from 24 vectors: there the basis may fill the space.
    max_basis = 120 if name == "wide" else 24
    check_eigenpairs(operator, operator.solve(3, which=which, tol=1e-8, max_hvp=3000, max_basis=max_basis), 3, which)


def test_a_restart_does_not_forget_how_large_the_operator_is():
    """The smallest eigenvalues of a matrix of rank one are its rounding: no asymmetry beside its largest."""
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        u = torch.randn(200, generator=generator)
        A = torch.outer(u, u)
        start = torch.linalg.eigh(A).eigenvectors[:, :7] + 0.1 * torch.randn(200, 7, generator=generator)
        result = eigsh(A.__matmul__, 7, which="SA", max_basis=9, v0=start, seed=seed)
        assert result.values.abs().max() < 1e-3


def test_many_iterations_raise_no_ghosts():
    operator = Known(SPECTRA["ghosts"])
    result = operator.solve(5, tol=1e-10, max_hvp=5000)
    check_eigenpairs(operator, result, 5, rtol=1e-10)
    assert result.num_hvp > 100


@pytest.mark.parametrize("n", [1, 2, 5, 30])
def test_all_eigenvalues(n):
    operator = Known(np.linspace(-3, 4, n) if n > 1 else [2.5])
    check_eigenpairs(operator, operator.solve(n, tol=1e-9, max_basis=max(n, 24)), n)


def test_more_than_there_are():
    with pytest.raises(ValueError, match="k: expected an int from 1 to 4, the size of H, got 5"):
        Known([1.0, 2.0, 3.0, 4.0]).solve(5)


def test_small_basis_and_large_k():
    operator = Known(np.linspace(0, 1, 60) ** 4)
    check_eigenpairs(operator, operator.solve(3, tol=1e-8, max_basis=5), 3)
    operator = Known(np.linspace(0, 1, 60) ** 4)
    check_eigenpairs(operator, operator.solve(20, tol=1e-8, max_basis=30), 20)


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_hessian_against_dense(which):
    params = mlp()
    expected = torch.linalg.eigvalsh(dense_hessian(params))
    order = torch.argsort({"LA": -expected, "SA": expected, "LM": -expected.abs()}[which])
    result = eigsh(HessianOperator(loss_of(params), params), 4, which=which, tol=1e-9)
    assert torch.allclose(result.values, expected[order[:4]].sort(descending=True).values, rtol=1e-9)


def test_warm_start_costs_less_and_a_vector_will_do():
    operator = Known([10.0, 8.0, 5.0, *np.linspace(0, 4, 500)])
    cold = operator.solve(3, tol=1e-5)
    warm = operator.solve(3, tol=1e-5, v0=cold.vectors)
    assert warm.num_hvp < 0.6 * cold.num_hvp
    one = operator.solve(1, tol=1e-5, v0=cold.vectors[:, 0])
    assert one.num_hvp <= 10
    assert torch.allclose(warm.values, operator.expected(3), rtol=1e-8)


def test_degenerate_v0():
    operator = Known([10.0, 8.0, 5.0, *np.linspace(0, 4, 50)])
    v = torch.randn(53, dtype=torch.float64)
    for v0 in (torch.zeros(53, dtype=torch.float64), torch.stack([v, v, 2 * v], 1), 1e-200 * v):
        operator.calls = 0
        check_eigenpairs(operator, operator.solve(3, tol=1e-8, v0=v0), 3)


def test_repeatable_and_global_rng_untouched():
    operator = Known(SPECTRA["ghosts"])
    state = torch.get_rng_state()
    a, b = operator.solve(3, seed=4), operator.solve(3, seed=4)
    other = operator.solve(3, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a.vectors, b.vectors)
    assert not torch.equal(a.vectors, other.vectors)


def test_budget_is_kept_and_said():
    operator = Known(SPECTRA["wide"])
    with pytest.warns(ConvergenceWarning, match="eigsh stopped by max_hvp"):
        result = operator.solve(3, which="SA", tol=1e-9, max_hvp=6)
    assert result.num_hvp == operator.calls == 6
    assert not result.converged.any()
    assert result.status == "max_hvp"
    assert torch.isfinite(result.residuals).all()
    V = result.vectors
    assert torch.allclose(torch.linalg.norm(operator.matrix @ V - V * result.values, dim=0), result.residuals)


@pytest.mark.parametrize("bad_call", [1, 4])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_product_that_is_not_finite(bad_call, value):
    operator = Known(SPECTRA["ghosts"])

    def broken(v):
        product = operator(v)
        if operator.calls == bad_call:
            product[3] = value
        return product

    with pytest.warns(ConvergenceWarning, match="non-finite product"):
        result = eigsh(broken, 3, n=203, dtype=torch.float64)
    assert result.status == "non-finite product"
    assert result.num_hvp == bad_call
    assert not result.converged.any()
    assert result.vectors.shape == (203, 3)
    assert torch.isnan(result.values).sum() == (3 if bad_call == 1 else 0)


def test_float32_stops_at_its_noise():
    operator = Known(SPECTRA["ghosts"], dtype=torch.float32)
    result = operator.solve(3, tol=0.0)
    assert result.vectors.dtype == torch.float32
    assert result.values.dtype == torch.float64
    assert torch.allclose(result.values, operator.expected(3), rtol=1e-5)
    assert result.num_hvp < 100


def test_noisy_products_stop_at_the_noise_floor():
    operator = Known([10.0, 8.0, 5.0, *np.linspace(0, 4, 400)])
    generator = torch.Generator().manual_seed(0)

    def noisy(v):
        return operator(v) + 1e-7 * torch.randn(v.shape, generator=generator, dtype=v.dtype)

    with pytest.warns(ConvergenceWarning, match="noise floor"):
        result = eigsh(noisy, 3, n=403, dtype=torch.float64, tol=1e-9)
    assert result.status == "noise floor"
    assert result.num_hvp < 150
    assert torch.allclose(result.values, operator.expected(3), rtol=1e-6)


@pytest.mark.parametrize("tol", [1e-6, 0.5])
def test_what_is_not_symmetric_is_noticed_before_the_budget_is_spent(tol):
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(100, 100, generator=generator, dtype=torch.float64)
    calls = []
    with pytest.raises(
        ValueError, match="H: expected a symmetric operator, got one that is not symmetric: u · H v and v · H u"
    ):
        eigsh(lambda v: (calls.append(1), (A + A.T + 0.3 * (A - A.T)) @ v)[1], 3, n=100, dtype=torch.float64, tol=tol)
    assert len(calls) <= 50


def test_operator_that_is_not_symmetric():
    matrix = torch.randn(50, 50, dtype=torch.float64)
    with pytest.raises(ValueError, match="H: expected a symmetric operator, got"):
        eigsh(lambda v: matrix @ v, 2, n=50, dtype=torch.float64, max_hvp=20)


def test_exception_passes_through_unchanged():
    error = KeyError("mine")

    def broken(v):
        raise error

    with pytest.raises(KeyError) as caught:
        eigsh(broken, 1, n=4)
    assert caught.value is error


def test_callable_keeps_its_grad_mode_and_cannot_harm_the_driver():
    operator = Known(SPECTRA["ghosts"])

    def product(v):
        assert torch.is_grad_enabled()
        assert not v.requires_grad
        out = operator(v)
        v.zero_()
        return out

    check_eigenpairs(operator, eigsh(product, 3, n=203, dtype=torch.float64, tol=1e-8), 3)
    with torch.no_grad():
        eigsh(
            lambda v: [operator(v), torch.is_grad_enabled()][torch.is_grad_enabled()],
            1,
            n=203,
            dtype=torch.float64,
        )


@pytest.fixture
def ctrl_c():
    """Python's own handler of SIGINT, which a process started in a shell's background does without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_interruptible(ctrl_c):
    """Ctrl-C during products that never run Python: the driver looks for signals itself."""
    size = 2000
    p = torch.randn(size, dtype=torch.float64, requires_grad=True)
    A = torch.randn(size, size, dtype=torch.float64)
    H = HessianOperator(torch.sin(A @ p).sum(), [p])
    with pytest.raises(KeyboardInterrupt):
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        eigsh(H, 20, tol=0.0, max_hvp=10_000)  # takes ten seconds here


@pytest.mark.parametrize(
    ("answer", "error", "match"),
    [
        (lambda v: 1.0, TypeError, r"H\(v\): expected a torch.Tensor, got float"),
        (lambda v: v[:-1], ValueError, r"H\(v\): expected .*shape \(5,\).*got shape \[4\]"),
        (lambda v: v.float(), ValueError, r"H\(v\): expected .*Double.* got .*Float"),
    ],
)
def test_bad_products(answer, error, match):
    with pytest.raises(error, match=match):
        eigsh(answer, 2, n=5, dtype=torch.float64)


def test_room_for_many_pairs_by_default():
    spectrum = 1.0 / torch.arange(1, 2001, dtype=torch.float64)
    result = eigsh(lambda v: spectrum * v, 30, n=2000, dtype=torch.float64, tol=1e-6)
    assert result.status == "converged"
    assert torch.allclose(result.values, spectrum[:30], rtol=1e-9)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"k": 0}, ValueError, "k: expected an int from 1 to 9, the size of H, got 0"),
        ({"k": 2.0}, TypeError, "k: expected an int, got float"),
        ({"which": "BE"}, ValueError, "which: expected 'LA', 'SA' or 'LM', got 'BE'"),
        ({"tol": -1e-3}, ValueError, r"tol: expected a number in \[0, 1\), got -0.001"),
        ({"tol": math.nan}, ValueError, r"tol: expected a number in \[0, 1\), got nan"),
        ({"max_hvp": 2}, ValueError, "max_hvp: expected an int >= 3, got 2"),
        ({"max_basis": 4}, ValueError, "max_basis: expected an int >= 5, got 4"),
        ({"n": None}, ValueError, "n: expected the length .* got None"),
        ({"dtype": torch.float16}, ValueError, "dtype: expected torch.float32 or torch.float64, got torch.float16"),
        ({"v0": [1.0]}, TypeError, "v0: expected a torch.Tensor, got list"),
        ({"v0": torch.ones(8, dtype=torch.float64)}, ValueError, r"v0: expected shape \(9,\) or \(9, m\), got \(8,\)"),
        ({"v0": torch.ones(9)}, ValueError, "v0: expected torch.float64 on cpu, got torch.float32 on cpu"),
        (
            {"v0": torch.full((9,), math.nan, dtype=torch.float64)},
            ValueError,
            "v0: expected finite numbers, got others",
        ),
        (
            {"v0": torch.ones(9, 7, dtype=torch.float64), "max_basis": 6},
            ValueError,
            "v0: expected at most max_basis = 6 columns, got 7",
        ),
        ({"v0": torch.tensor(1.0, dtype=torch.float64), "n": None}, ValueError, r"v0: expected shape .*got \(\)"),
        ({"seed": 1.5}, TypeError, "seed: expected an int, got float"),
        ({"tol": "x"}, TypeError, "tol: expected a number .* got 'x'"),
        ({"H": 3}, TypeError, "H: expected a HessianOperator or a callable .* got int"),
    ],
    ids=str,
)
def test_bad_arguments(options, error, match):
    arguments = {"H": lambda v: v, "k": 3, "n": 9, "dtype": torch.float64} | options
    with pytest.raises(error, match=match):
        eigsh(arguments.pop("H"), arguments.pop("k"), **arguments)


@pytest.mark.parametrize(
    "form",
    [
        lambda product: torch.stack([product, product], dim=1)[:, 0],
        lambda product: torch._neg_view(-product),
        lambda product: product.requires_grad_(),
    ],
    ids=["strided", "negative view", "requires grad"],
)
def test_products_in_any_form(form):
    operator = Known([9.0, 4.0, 1.0, 0.5, 0.25, 0.1, 0.0])
    result = eigsh(lambda v: form(operator(v)), 2, n=7, dtype=torch.float64)
    check_eigenpairs(operator, result, 2)


def test_zero_products():
    """A constant is a form of its own (one number, expanded, or a symbolic zero)."""
    for form in (
        lambda v: torch.zeros(1, dtype=v.dtype).expand(5),
        lambda v: torch._efficientzerotensor(5, dtype=v.dtype),
    ):
        result = eigsh(form, 2, n=5, dtype=torch.float64)
        assert result.values.tolist() == [0.0, 0.0]
        assert result.converged.all()


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_long_vectors_and_a_small_basis(dtype, rtol):
    """Longer than what is done in one piece, and a basis that restarts often."""
    n = 40_000
    spectrum = torch.cat([torch.tensor([9.0, 7.0, 5.0, -6.0]), torch.linspace(-1, 2, n - 4)]).to(dtype)
    mirror = torch.randn(n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mirror = (mirror / mirror.norm()).to(dtype)

    def reflect(v):
        return v - 2 * mirror * (mirror @ v)

    result = eigsh(lambda v: reflect(spectrum * reflect(v)), 3, tol=1e-5, max_basis=6, n=n, dtype=dtype)
    assert result.num_hvp > 20
    assert result.converged.all()
    assert torch.allclose(result.values, torch.tensor([9.0, 7.0, 5.0], dtype=torch.float64), rtol=rtol, atol=0)
    for i, residual in enumerate(result.residuals):
        y = result.vectors[:, i]
        assert float((reflect(spectrum * reflect(y)) - result.values[i] * y).norm()) < 1.5 * float(residual) + 1e-5
        assert float(y.norm()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, s) for s in (1e-37, 1e-22, 1e22, 1e37)]
    + [(torch.float64, s) for s in (1e-300, 1e-160, 1e160, 1e300)],
)
def test_squares_that_leave_the_range_of_the_dtype(dtype, scale):
    diagonal = torch.linspace(-0.5, 1, 100, dtype=dtype)
    plain = eigsh(lambda v: diagonal * v, 3, n=100, dtype=dtype, tol=1e-3)
    scaled = eigsh(lambda v: diagonal * scale * v, 3, n=100, dtype=dtype, tol=1e-3)
    assert scaled.status == "converged"
    assert torch.allclose(scaled.values / scale, plain.values, rtol=1e-6)
    assert torch.allclose(scaled.residuals / scale, plain.residuals, rtol=1e-2)


def test_products_that_grow_out_of_the_range_on_the_way():
    """The start is an eigenvector of a value that the others exceed by 200 decades."""
    diagonal = torch.tensor([1e-200, *np.linspace(0.1, 1, 60)], dtype=torch.float64)
    start = torch.eye(61, 1, dtype=torch.float64)
    result = eigsh(lambda v: diagonal * v, 2, v0=start, tol=1e-8)
    assert torch.allclose(result.values, diagonal[-2:].flip(0), rtol=1e-8)


@pytest.mark.parametrize("factor", [1e-300, 1e-200, 1e200, 1e300])
def test_the_length_of_v0_does_not_matter(factor):
    operator = Known(np.linspace(0, 9, 400))
    start = operator.Q[:, [399]]
    counts = [operator.solve(1, v0=start * f).num_hvp for f in (1.0, factor)]
    assert counts[1] == counts[0]


def test_float32_of_many_parameters():
    """A sum of millions of float32 products, added up in float32, is off by 1e-4, and the basis not orthonormal."""
    n = 3_000_000
    diagonal = torch.cat([torch.tensor([9.0, 7.0, 5.0]), torch.linspace(-1, 2, n - 3)])
    result = eigsh(lambda v: diagonal * v, 3, n=n, dtype=torch.float32, max_basis=12)
    assert result.status == "converged"
    assert torch.allclose(result.values, torch.tensor([9.0, 7.0, 5.0], dtype=torch.float64), rtol=5e-6)
    V = result.vectors.double()
    assert torch.allclose(V.T @ V, torch.eye(3, dtype=torch.float64), atol=1e-6)
    true_residuals = torch.linalg.norm(diagonal.double()[:, None] * V - V * result.values, dim=0)
    assert torch.allclose(result.residuals, true_residuals, rtol=0.1, atol=1e-5)


def test_the_number_of_threads_changes_nothing():
    """Processes of a group that have different ones must come to the same decisions."""
    diagonal = torch.linspace(-1, 1, 200_000) ** 3
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        with pytest.warns(ConvergenceWarning, match="audit was inconclusive"):
            results.append(eigsh(lambda v: diagonal * v, 3, n=len(diagonal), tol=1e-2, max_basis=12))
    torch.set_num_threads(threads)
    for result in results[1:]:
        assert torch.equal(result.values, results[0].values)
        assert torch.equal(result.vectors, results[0].vectors)


SUMS = """
import hashlib, torch
from dynloss_ext import _C, eigsh
diagonal = torch.linspace(-1, 1, 9001) ** 3
result = eigsh(lambda v: diagonal * v, 2, n=len(diagonal), tol=1e-2, max_basis=8)
print(_C.cpu_instruction_set(), hashlib.sha256(result.vectors.numpy().tobytes()).hexdigest(), *result.values.tolist())
"""


def test_the_driver_runs_the_instruction_set_that_is_asked_for():
    """Each adds up in an order of its own, which shows in the last bits."""
    names, bits, values = set(), set(), []
    for capability in ("default", "avx2", "avx512"):
        name, digest, *found = run_python("-c", SUMS, DYNLOSS_CPU_CAPABILITY=capability).split()
        names.add(name)
        bits.add((name, digest))
        values.append([float(value) for value in found])
    assert len({digest for _, digest in bits}) == len(bits) == len(names)
    assert values[1:] == [pytest.approx(values[0], rel=1e-5)] * 2


@pytest.mark.parametrize("n", [600, 20_000, 100_000])
def test_autocast_does_not_reach_the_driver(n):
    diagonal = torch.linspace(-1, 1, n) ** 5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # audits of so crowded a spectrum are inconclusive
        plain = eigsh(lambda v: diagonal * v, 2, n=n, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = eigsh(lambda v: diagonal * v, 2, n=n, dtype=torch.float32)
    assert torch.equal(inside.values, plain.values)
    assert inside.vectors.dtype == torch.float32


def saturated(factor, dtype):
    """A network that fits its data so well that the Hessian sinks into the rounding of its products."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 2, generator=generator)
    y = (x[:, 0] > 0).long()
    x[:, 0] += 4.0 * y - 2.0
    params = [torch.randn(shape, generator=generator) * 0.5 for shape in ((2, 20), (20,), (20, 2), (2,))]
    params = [p.requires_grad_() for p in params]

    def loss(p, scale):
        return torch.nn.functional.cross_entropy((torch.tanh(x.to(p[0].dtype) @ p[0] + p[1]) @ p[2] + p[3]) * scale, y)

    for _ in range(300):
        for p, g in zip(params, torch.autograd.grad(loss(params, 1.0), params), strict=True):
            p.data -= 0.5 * g
    params = [p.detach().to(dtype).requires_grad_() for p in params]
    return HessianOperator(loss(params, factor), params)


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
@pytest.mark.parametrize(("factor", "dtype"), [(3.0, torch.float32), (8.0, torch.float32), (20.0, torch.float64)])
def test_a_hessian_below_its_rounding_ends_at_the_noise_floor(factor, dtype, which):
    """It is symmetric, whatever its products look like: no error, no thousand products."""
    H = saturated(factor, dtype)
    for seed in range(10):
        with pytest.warns(ConvergenceWarning, match="noise floor"):
            result = eigsh(H, 3, which=which, seed=seed)
        assert result.status == "noise floor"
        assert not result.converged.all()
        assert result.num_hvp < 100
        V = result.vectors
        assert torch.allclose(V.T @ V, torch.eye(3, dtype=dtype), atol=1e-6)


def test_no_floor_is_seen_where_convergence_is_slow():
    """Eight products without much progress, in float32, far above what rounding explains."""
    diagonal = torch.cat([torch.tensor([100.0, 1.0, 0.99]), torch.linspace(-0.5, 0.98, 199_997)])
    with pytest.warns(ConvergenceWarning, match="audit was inconclusive"):
        result = eigsh(lambda v: diagonal * v, 3, n=200_000, tol=1e-4)
    assert result.converged.all()
    assert result.values[2].item() == pytest.approx(0.99, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("on_device_path", [False, True])
def test_a_basis_is_orthonormal_to_rounding(dtype, on_device_path):
    """Of fifty vectors, most of which converge: where orthogonality is lost first. In precision that measures it."""
    size, seen = 20_000, []
    diagonal = torch.linspace(0, 1, size, dtype=dtype)
    diagonal[-40:] = torch.linspace(2, 100, 40, dtype=dtype)

    def product(v):
        seen.append(v / v.norm())
        return diagonal * v

    _C.take_device_path(on_device_path)
    try:
        eigsh(product, 30, n=size, dtype=dtype, max_basis=68, tol=1e-6)
    finally:
        _C.take_device_path(False)
    assert 50 <= len(seen) <= 68  # before a restart, which goes on with other vectors
    basis = torch.stack(seen).numpy().astype(np.longdouble)
    overlaps = basis @ basis.T
    np.fill_diagonal(overlaps, 0)
    assert abs(overlaps).max() <= 12 * torch.finfo(dtype).eps
