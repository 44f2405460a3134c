"""What every operator offers: products, and what is composed of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from dynloss_ext import _C
from dynloss_ext._checks import (
    Parameters,
    Params,
    check_number,
    check_tensor,
    check_vector,
    is_sharded,
    named_tensors,
)
from dynloss_ext._differences import GradientDifferences
from dynloss_ext._double_backward import double_backward
from dynloss_ext._shards import Shards, agreed, largest_entries

Made = TypeVar("Made", bound="CurvatureOperator")
Product = Callable[[Tensor], Tensor]


class Source(Protocol):
    """What is behind an operator."""

    size: int

    @property
    def params(self) -> Params | None:
        """What the vectors are made of, where that is known."""

    def operator(self) -> _C.SymmetricOperator:
        """What the driver calls."""

    def fail(self, error: Exception) -> None:
        """A product cannot be asked for, by this error: tells whoever waits for it."""

    def suspects(self) -> list[str]:
        """Names of nodes of the graph whose second derivative may be wrong."""

    def products(self) -> AbstractContextManager[object]:
        """In which products can be had and leave no trace."""


def products_with(H: object) -> AbstractContextManager[object]:
    """In which products with an operator or a callable are asked for."""
    return H._source.products() if isinstance(H, CurvatureOperator) else double_backward()


def driven(H: CurvatureOperator) -> tuple[_C.SymmetricOperator, Shards | None]:
    """The operator on shards of vectors, and what these are, where it has any; on whole ones elsewhere."""
    source = H._source
    if isinstance(source, GradientDifferences | Composed) and source.shards is not None:
        return source.operator(in_shards=True), source.shards
    return H._op, None


def shards_of(H: CurvatureOperator) -> Shards | None:
    """What processes may hold of its vectors."""
    return H._source.shards if isinstance(H._source, GradientDifferences | Composed) else None


class CurvatureOperator:
    """A symmetric P × P matrix known by its products with flat vectors: what every operator here offers.

    It is what sums, blocks and ensembles give, and the type to ask for where any operator will do; it is not made by
    itself.

    Operators add up: ``H + G``, ``H - G``, ``a * H``, ``H / a``, ``-H`` and ``sum([H, G])`` are operators again, as
    are those of `restrict` and `preconditioned`. Nothing is computed before a product is asked for; that costs the
    products of the parts, a few vectors of memory, and 5 to 15 µs of Python. They follow a part that is
    refreshed, and are refused where a part would be.

    Attributes:
        shape: (P, P).
        dtype: of the parameters, the vectors and the products.
        device: likewise.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> H = HessianOperator((x**3).sum(), [x])
        >>> isinstance(H, CurvatureOperator), isinstance(2 * H, CurvatureOperator)
        (True, True)
        >>> (2 * H + H).to_dense()
        tensor([[18.,  0.],
                [ 0., 36.]])
    """

    def __init__(self, source: Source, like: Tensor) -> None:
        self._source = source
        self.shape = (source.size, source.size)
        self.dtype = like.dtype
        self.device = like.device

    @classmethod
    def _of(cls: type[Made], source: Source, like: Tensor) -> Made:
        made = cls.__new__(cls)
        CurvatureOperator.__init__(made, source, like)
        return made

    @property
    def _op(self) -> _C.SymmetricOperator:
        return self._source.operator()

    def __matmul__(self, v: Tensor) -> Tensor:
        """H v for v of shape (P,), or for every column of v of shape (P, k).

        Of an operator by sharded parameters v is whole in every process, and so is the product; or v is in every
        process its shard, as the vectors of `eigsh` are, and so is the product. All processes make the same call.

        Nothing is recorded for autograd: the product is a constant, also where v or a parameter requires grad.
        """
        op, cut = driven(self)
        if cut is not None and cut.any(not isinstance(v, Tensor) or v.shape[:1] != (cut.size,)):
            op = self._op
        params = self._source.params

        def check() -> tuple[Tensor, object]:
            check_vector("v", v, op.size, self.dtype, self.device)
            return v.detach(), v.shape[1:]

        shards = None if params is None else params.shards
        try:
            v = agreed(shards, "H @ v", check)
        except (TypeError, ValueError) as error:
            if shards is None:
                self._source.fail(error)
            raise
        if self.device.type == "cpu":  # elsewhere each product would wait for the device, and could not be captured
            op.check_values()
        with products_with(self):
            if v.dim() == 1:
                return op.apply(v.contiguous())
            columns = [op.apply(column.contiguous()) for column in v.unbind(1)]
        return torch.stack(columns, dim=1) if columns else torch.empty_like(v)

    __array_ufunc__ = None  # NumPy's numbers leave ``a * H`` to us

    def __add__(self, other: CurvatureOperator) -> CurvatureOperator:
        """H + G, of operators by the same parameters."""
        if not isinstance(other, CurvatureOperator):
            return NotImplemented
        return _made_of(_sum(self, other))

    def __sub__(self, other: CurvatureOperator) -> CurvatureOperator:
        """H - G."""
        return self + -other if isinstance(other, CurvatureOperator) else NotImplemented

    def __mul__(self, factor: float) -> CurvatureOperator:
        """The operator times a finite number."""
        return _made_of(_multiple(self, check_number("factor", factor, -math.inf, open_low=True)))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> CurvatureOperator:
        """The operator divided by a finite number that is not 0."""
        number = check_number("divisor", divisor, -math.inf, open_low=True)
        if number == 0.0:
            raise ValueError("divisor: expected a number that is not 0, got 0")
        return self * (1.0 / number)

    def __radd__(self, zero: object) -> CurvatureOperator:
        """0 + H, with which Python's ``sum`` begins."""
        return self if isinstance(zero, int) and zero == 0 else NotImplemented

    def __neg__(self) -> CurvatureOperator:
        """-H."""
        return self * -1.0

    @property
    def noise(self) -> float:
        """How far a product with a unit vector may be from H v, in length, where that is estimated: of
        `HessianOperator.from_gradients` and what is made of it; 0 for others, whose rounding is not."""
        return self._op.noise()

    @property
    def T(self: Made) -> Made:
        """The operator itself: it is symmetric."""
        return self

    def restrict(self, params: Parameters) -> CurvatureOperator:
        """The diagonal block of some of the operator's parameters, in the order given.

        A product costs one of the whole operator; `HessianOperator.layers` records blocks whose products cost less.

        Raises:
            TypeError, ValueError: one of ``params`` is none of the operator's, or the operator was made without any.

        Example:
            >>> x, y = torch.ones(2, requires_grad=True), torch.ones(1, requires_grad=True)
            >>> H = HessianOperator((x**2).sum() * y.sum() ** 3, [x, y])
            >>> H.restrict([y]).to_dense()
            tensor([[12.]])
        """
        return _made_of(_block(self, params))

    def preconditioned(self, diagonal: Tensor | Iterable[Tensor], *, weight_decay: float = 0.0) -> CurvatureOperator:
        """P^(-1/2) H P^(-1/2) for a diagonal P: what an optimizer that divides by P sees of the curvature.

        It has the eigenvalues of P⁻¹ H, and is symmetric. Its vectors are in the coordinates P^(1/2) x: an eigenvector
        u stands for the direction P^(-1/2) u of the parameters. P is copied: it stays as it is where the optimizer's
        state goes on.

        Args:
            diagonal: of P, positive: a tensor (P,), or a list of tensors in the shapes of the parameters, as
                `preconditioner` gives them; of the operator's dtype and device.
            weight_decay: w of an optimizer that adds w x to the gradient before it divides, as `torch.optim.Adam`
                and `RMSprop` do: P^(-1/2) (H + w I) P^(-1/2). Not for AdamW.

        Raises:
            TypeError, ValueError: the diagonal is of another shape, dtype or device, or not finite and positive.

        Example:
            >>> x = torch.ones(2, requires_grad=True)
            >>> H = HessianOperator((x**2).sum() + x.prod(), [x])
            >>> H.preconditioned(torch.tensor([1.0, 4.0])).to_dense()
            tensor([[2.0000, 0.5000],
                    [0.5000, 0.5000]])
        """
        decay = check_number("weight_decay", weight_decay, 0)
        return _made_of(_congruence(self, diagonal, decay))

    def unflatten(self, v: Tensor) -> dict[str, Tensor] | list[Tensor]:
        """The pieces of v, (P,) or (P, k), in the shapes of the parameters, k last.

        Of an operator by sharded parameters also those of this process's shard of v, as the vectors of `eigsh` are.

        Returns:
            by their names, where the parameters were given with names; otherwise a list in their order. Views of v
            where it is contiguous. Of a shard, DTensors that are sharded like the parameters, whose `full_tensor()`
            gathers them.

        Raises:
            TypeError, ValueError: v is no vector of the operator; the operator was made without parameters, or with
                one name for several.

        Example:
            >>> model = torch.nn.Linear(2, 1)
            >>> H = HessianOperator(model(torch.ones(1, 2)).square().sum(), model.named_parameters())
            >>> H.unflatten(torch.arange(3.0))
            {'weight': tensor([[0., 1.]]), 'bias': tensor([2.])}
        """
        params = _params_of(self)
        if params.shards is not None and isinstance(v, Tensor) and v.shape[:1] == (params.shards.size,):
            check_vector("v", v, params.shards.size, self.dtype, self.device)
            pieces = params.shards.unflatten(v)
        else:
            check_vector("v", v, self.shape[0], self.dtype, self.device)
            pieces = [
                piece.reshape(*p.shape, *v.shape[1:])
                for p, piece in zip(params, torch.split(v, [p.numel() for p in params]), strict=True)
            ]
        if not params.named:
            return pieces
        if len(named := dict(zip(params.labels, pieces, strict=True))) < len(pieces):
            twice = next(label for label in params.labels if params.labels.count(label) > 1)
            raise ValueError(f"params: expected a name for each, got {twice} for several: give them without names")
        return named

    def to_dense(self) -> Tensor:
        """The matrix itself, (P, P), by P products: for small P."""
        return self @ torch.eye(self.shape[0], dtype=self.dtype, device=self.device)

    def as_scipy(self) -> Any:
        """A `scipy.sparse.linalg.LinearOperator` on NumPy vectors, which travel to the device and back."""
        import numpy as np
        from scipy.sparse.linalg import LinearOperator

        name = str(self.dtype).removeprefix("torch.")

        def product(x: Any) -> Any:
            if np.iscomplexobj(x):
                raise TypeError(f"x: expected real numbers, got {x.dtype}")
            v = torch.from_numpy(np.array(x, dtype=name, order="C")).to(self.device)
            return (self @ v).cpu().numpy()

        def vector_product(x: Any) -> Any:
            return product(x.reshape(-1))

        return LinearOperator(
            self.shape, matvec=vector_product, rmatvec=vector_product, matmat=product, rmatmat=product, dtype=name
        )

    def __reduce__(self) -> Any:
        raise TypeError(
            f"a {type(self).__name__} holds recorded graphs and cannot be copied or pickled: make another one"
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype}, device={self.device})"


class Composed:
    """A matrix whose products are made of those of other operators, its parts.

    It holds the parts themselves: one that is refreshed takes it along.

    Args:
        parts: of one dtype and device.
        combine: (the products of the parts, v) -> the product with v, linear and symmetric.
        params: what v is made of, where that is known.
        factors: by how much an error of each part's product is longer in the combined one, at most.
        elementwise: whether ``combine`` does with shards of vectors what it does with whole ones.
    """

    def __init__(
        self,
        parts: Sequence[CurvatureOperator],
        combine: Callable[[Sequence[Product], Tensor], Tensor],
        size: int,
        params: Params | None,
        factors: Sequence[float],
        elementwise: bool = True,
    ) -> None:
        self._parts, self._combine, self.size, self.params = parts, combine, size, params
        self._factors = factors
        self.like = torch.empty(0, dtype=parts[0].dtype, device=parts[0].device)
        # The same of all parts that have any: they are by the same parameters.
        found = [shards_of(part) for part in parts]
        self.shards = found[0] if elementwise and None not in found else None

    def operator(self, in_shards: bool = False) -> _C.SymmetricOperator:
        """What the driver calls. Not kept: the garbage collector does not see through it."""
        ops = [driven(part)[0] if in_shards else part._op for part in self._parts]
        plain = partial(self._combine, [op.apply for op in ops])
        noisy = partial(self._combine, [op.apply_noisily for op in ops])

        def noise() -> float:
            return sum(factor * op.noise() for factor, op in zip(self._factors, ops, strict=True))

        shards = self.shards if in_shards else None
        size = self.size if shards is None else shards.size
        return _C.PythonOperator(plain, size, self.like, noisy, ops, noise, shards)

    def fail(self, error: Exception) -> None:
        """Tells those who wait for the first product that is shared; they ask for no other."""
        for part in self._parts:
            part._source.fail(error)

    def suspects(self) -> list[str]:
        """Those of all parts."""
        return list(dict.fromkeys(name for part in self._parts for name in part._source.suspects()))

    @contextmanager
    def products(self) -> Iterator[None]:
        """In which those of all parts can be had."""
        with ExitStack() as stack:
            for part in self._parts:
                stack.enter_context(part._source.products())
            yield


def _made_of(source: Composed) -> CurvatureOperator:
    return CurvatureOperator(source, source.like)


def _sum(a: CurvatureOperator, b: CurvatureOperator) -> Composed:
    """A + B, of operators on the same vectors."""
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        raise ValueError(
            f"H: expected operators of one shape, dtype and device, {a.shape}, {a.dtype} on {a.device}, got {b.shape},"
            f" {b.dtype} on {b.device}"
        )
    ours, theirs = a._source.params, b._source.params
    if ours is not None and theirs is not None and list(map(id, ours)) != list(map(id, theirs)):
        raise ValueError("H: expected operators by the same params in the same order, got others")
    params = theirs if ours is None else ours
    return Composed((a, b), lambda products, v: products[0](v) + products[1](v), a.shape[0], params, (1.0, 1.0))


def _multiple(a: CurvatureOperator, factor: float) -> Composed:
    """The operator times a number."""
    return Composed((a,), lambda products, v: factor * products[0](v), a.shape[0], a._source.params, (abs(factor),))


def _block(a: CurvatureOperator, params: Parameters) -> Composed:
    """The block of some of the parameters, in the order given."""
    own, start, places = _params_of(a), 0, dict[int, tuple[slice, str]]()
    for label, p in zip(own.labels, own, strict=True):
        places[id(p)] = slice(start, start + p.numel()), label
        start += p.numel()
    some = named_tensors(params)
    for label, p in zip(some.labels, some, strict=True):
        if id(p) not in places:
            raise ValueError(f"{label}: expected one of the operator's params, got another of shape {tuple(p.shape)}")
    chosen, labels = zip(*(places[id(p)] for p in some), strict=True)
    sizes = [p.numel() for p in some]

    def combine(products: Sequence[Product], v: Tensor) -> Tensor:
        whole = v.new_zeros(a.shape[0])
        for place, piece in zip(chosen, torch.split(v, sizes), strict=True):
            whole[place] = piece
        product = products[0](whole)
        return torch.cat([product[place] for place in chosen])

    return Composed((a,), combine, sum(sizes), Params(some, list(labels), own.named), (1.0,), elementwise=False)


def _congruence(a: CurvatureOperator, diagonal: Tensor | Iterable[Tensor], weight_decay: float) -> Composed:
    """P^(-1/2) (A + w I) P^(-1/2) for a diagonal P."""
    shards = shards_of(a)

    def check() -> tuple[Tensor, object]:
        return _flat_diagonal(a, diagonal).rsqrt(), weight_decay

    root = agreed(shards, "preconditioned", check)
    largest = float(largest_entries(root[None], shards))

    def combine(products: Sequence[Product], v: Tensor) -> Tensor:
        scale = root if shards is None or len(v) == len(root) else shards.gather(root)
        v = scale * v
        product = products[0](v)
        return scale * (torch.add(product, v, alpha=weight_decay) if weight_decay else product)

    return Composed((a,), combine, a.shape[0], a._source.params, (largest**2,))


def _params_of(a: CurvatureOperator) -> Params:
    """The parameters of an operator that was made with some."""
    if a._source.params is None:
        raise ValueError("H: expected an operator that was made with params, got one that knows of none")
    return a._source.params


def _flat_diagonal(a: CurvatureOperator, diagonal: Tensor | Iterable[Tensor]) -> Tensor:
    """(P,), finite and more than 0; of an operator in shards what this process has of it."""
    shards = shards_of(a)
    if isinstance(diagonal, Tensor):
        if check_vector("diagonal", diagonal, a.shape[0], a.dtype, a.device).dim() != 1:
            raise ValueError(f"diagonal: expected shape ({a.shape[0]},), got {tuple(diagonal.shape)}")
        flat = diagonal.detach() if shards is None else shards.cut(diagonal.detach())
    else:
        flat = _flat_pieces(a, diagonal, shards)
    wrong = flat[~(torch.isfinite(flat) & (flat > 0))]
    if wrong.numel():
        raise ValueError(f"diagonal: expected finite numbers that are more than 0, got {wrong[0].item()}")
    return flat


def _flat_pieces(a: CurvatureOperator, diagonal: object, shards: Shards | None) -> Tensor:
    """The same of a list of tensors like the parameters, of their dtypes or the operator's."""
    if isinstance(diagonal, Mapping) or not isinstance(diagonal, Iterable):
        raise TypeError(
            f"diagonal: expected a tensor of shape ({a.shape[0]},) or a list of tensors, got {type(diagonal).__name__}"
        )
    pieces = [check_tensor(f"diagonal[{i}]", piece).detach() for i, piece in enumerate(diagonal)]
    shapes, params = [tuple(piece.shape) for piece in pieces], a._source.params
    if not pieces or (params is not None and shapes != [tuple(p.shape) for p in params]):
        expected = "at least one tensor" if params is None else f"shapes {[tuple(p.shape) for p in params]}"
        raise ValueError(f"diagonal: expected {expected}, got {shapes}")
    if params is not None:  # the state of an optimizer has the dtypes of what it optimizes
        pieces = [
            piece.to(a.dtype) if piece.dtype == p.dtype else piece for piece, p in zip(pieces, params, strict=True)
        ]
    if shards is not None and all(map(is_sharded, pieces)):
        return torch.cat([shards.entries(piece) for piece in pieces])
    whole = [piece.full_tensor() if is_sharded(piece) else piece for piece in pieces]  # type: ignore[attr-defined]
    return _flat_diagonal(a, torch.cat([piece.reshape(-1) for piece in whole]))
