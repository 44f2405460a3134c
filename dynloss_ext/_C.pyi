from collections.abc import Callable, Sequence

from torch import Generator, Tensor

def cpu_instruction_set() -> str: ...

# Plain eager calls; NotImplemented (not in the types) for all others.
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    oscillation: object,
    step: object,
    weight: object,
    reduction: str,
    normalization: str,
    ignore_index: int,
    label_smoothing: float,
    /,
) -> Tensor: ...
def cross_entropy_with_gradient(
    logits: Tensor,
    target: Tensor,
    oscillation: object,
    step: object,
    weight: object,
    reduction: str,
    normalization: str,
    ignore_index: int,
    label_smoothing: float,
    /,
) -> tuple[Tensor, Tensor]: ...

class SymmetricOperator:
    @property
    def size(self) -> int: ...
    @property
    def dimension(self) -> int: ...
    def apply(self, v: Tensor) -> Tensor: ...
    def apply_noisily(self, v: Tensor) -> Tensor: ...
    def random_signs(self, generator: Generator) -> Tensor: ...
    def check_values(self) -> None: ...
    def noise(self) -> float: ...

class FlatParameters:
    def __init__(self, parameters: Sequence[Tensor], labels: Sequence[str]) -> None: ...
    def check_values(self) -> None: ...

class GraphOperator(SymmetricOperator):
    def __init__(self, gradients: Sequence[Tensor | None], parameters: FlatParameters) -> None: ...

class GaussNewtonOperator(SymmetricOperator):
    def __init__(
        self,
        outputs: Tensor,
        output_gradient: Tensor,
        dummy: Tensor,
        pullback: Sequence[Tensor | None],
        parameters: FlatParameters,
    ) -> None: ...

class PythonOperator(SymmetricOperator):
    def __init__(
        self,
        product: Callable[[Tensor], Tensor],
        size: int,
        like: Tensor,
        noisy: Callable[[Tensor], Tensor] | None = None,
        parts: Sequence[SymmetricOperator] = (),
        noise: Callable[[], float] | None = None,
        shards: object | None = None,
    ) -> None: ...

class Perceptrons:
    def __init__(
        self,
        parameters: Tensor,
        inputs: Tensor,
        target: Tensor,
        hidden: int,
        activation: int,
        step: int,
        clock: Tensor,
        class_order: Tensor | None,
        table: Tensor | None,
    ) -> None: ...

class PerceptronOperator(SymmetricOperator):
    def __init__(self, ensemble: Perceptrons, member: int) -> None: ...

def perceptron_eigenvalues(
    ensemble: Perceptrons,
    *,
    wanted: Sequence[bool],
    k: int,
    tol: float,
    start: Tensor | None,
    max_hvp: int,
    max_basis: int,
    seed: int,
    audit: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """For every member: values, residuals, converged, number of products, and vectors (M, k, P)."""

def eigsh(
    op: SymmetricOperator,
    *,
    k: int,
    which: str,
    tol: float,
    v0: Tensor | None,
    max_hvp: int,
    max_basis: int,
    seed: int,
    audit: bool,
) -> tuple[Tensor, Tensor, Tensor, int, Tensor, str, float, list[int], float]:
    """values, vectors (k, P), residuals, number of products, converged, status, probability of a miss, origins,
    asymmetry."""

def sample_trace(
    op: SymmetricOperator, *, range: int, samples: int, generator: Generator
) -> tuple[float, list[float], float]:
    """The trace on the range of H on random vectors, zᵀ H z for random z of ±1 without their part in it, asymmetry."""

def gauss_quadrature(
    op: SymmetricOperator, *, steps: int, probes: int, generator: Generator
) -> list[tuple[list[float], list[float], float]]:
    """Nodes, ascending, and weights of the spectral measure of each of some random vectors of ±1, and asymmetry."""

def fingerprints(tensors: Sequence[Tensor]) -> Tensor:
    """(tensors,) int64, of the values at each place of float32 or float64 tensors."""

def take_device_path(on: bool) -> None: ...
def num_reads() -> int: ...
