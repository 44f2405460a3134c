"""Second derivatives of models that torch, left alone, differentiates once."""

from __future__ import annotations

import re
import sys
import threading
import warnings
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import Tensor

from dynloss_ext._evaluation import graph_nodes

# What an operator that torch cannot differentiate twice belongs to, and what to do about it, by a part of its name.
_REMEDIES = {
    "scaled_dot_product": (
        "fused attention",
        "give a closure, which runs with attention that can be; or compute the loss under"
        ' torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or with attn_implementation="eager" of a model of'
        " transformers",
    ),
    "embedding_bag": ("nn.EmbeddingBag", "sum what nn.Embedding gives"),
    "cdist": ("torch.cdist", "torch.linalg.vector_norm of the differences can be"),
    "pdist": ("F.pdist", "torch.linalg.vector_norm of the differences can be"),
    "ctc_loss": ("nn.CTCLoss", "compute the loss by logsumexp over the alignments"),
    "margin_loss": ("a margin loss", "write it with torch.relu"),
    "cudnn_rnn": ("a recurrent layer of cuDNN", "compute the loss under torch.backends.cudnn.flags(enabled=False)"),
}
# autograd.Functions of torch itself that have one derivative only.
_FUNCTIONS = {
    "CompiledFunction": (
        "torch.compile",
        "give a closure, in which what was compiled before it runs uncompiled; or call the module itself",
    ),
    "CheckpointFunction": ("a checkpoint with use_reentrant=True", "use_reentrant=False can be differentiated twice"),
}


def _ignored(_: object) -> None: ...


_ONCE_DIFFERENTIABLE = torch.autograd.function.once_differentiable(_ignored).__code__


class _Settings:
    """Attention by plain operators and no compiled code: for the whole process, from the first user to the last.

    Fused attention and compiled code have one derivative only. They are chosen where the forward pass runs, which for a
    checkpoint is in the backward pass, on whatever thread. So products of several threads share the settings, and what
    other threads compute meanwhile is right, but slower.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._kernels_before: tuple[bool, ...] | None = None
        self._stance: Any = None

    def take(self) -> None:
        with self._lock:
            self._users += 1
            if self._kernels_before is None:
                self._kernels_before = _kernels()
                _enable(_PLAIN)
            # The compiler takes a second to import, and has compiled nothing until somebody does.
            if self._stance is None and "torch._dynamo" in sys.modules:
                self._stance = torch.compiler.set_stance("force_eager")

    def put_back(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users > 0:
                return
            # What another thread has chosen meanwhile is not ours to undo.
            if self._kernels_before is not None and _kernels() == _PLAIN:
                _enable(self._kernels_before)
            if self._stance is not None and sys.modules["torch._dynamo.eval_frame"]._stance is self._stance.stance:
                self._stance.__exit__(None, None, None)
            self._kernels_before = self._stance = None


# Of scaled_dot_product_attention: names in torch.backends.cuda, which the CPU heeds, too.
_KERNELS = ("flash_sdp", "mem_efficient_sdp", "cudnn_sdp", "math_sdp")
_PLAIN = (False, False, False, True)


def _kernels() -> tuple[bool, ...]:
    return tuple(getattr(torch.backends.cuda, f"{name}_enabled")() for name in _KERNELS)


def _enable(chosen: tuple[bool, ...]) -> None:
    for name, on in zip(_KERNELS, chosen, strict=True):
        getattr(torch.backends.cuda, f"enable_{name}")(on)


_settings = _Settings()


class double_backward:
    """A context in which a model is evaluated or differentiated so that it can be differentiated twice.

    Raises:
        RuntimeError: what torch says where it cannot, in words that say which layer it is, or that the graph was freed,
            and what to do.
    """

    def __enter__(self) -> None:
        _settings.take()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _settings.put_back()
        if isinstance(error, RuntimeError):
            _explain(error)


def _explain(error: RuntimeError) -> None:
    """Raises an error in its place, if it says that torch has no second derivative, or no graph any more."""
    text = str(error)
    if found := re.search(r"derivative for '?(?:aten::)?([\w: ]+?)'? is not implemented", text):
        operator = found[1].removesuffix("_backward").strip("_")
        order = "a first derivative only" if found[1].endswith("_backward") else "no derivative"
        layer, remedy = next(
            (known for part, known in _REMEDIES.items() if part in operator),
            (f"the operator {operator}", "replace it by others that can be"),
        )
        _refuse(layer, f"{operator} has {order}: {remedy}", error)
    if "Recomputed values" in text:
        _refuse("a checkpoint whose forward pass took fused attention", _REMEDIES["scaled_dot_product"][1], error)
    if "backward through the graph a second time" in text:
        raise RuntimeError(
            "loss: expected one whose graph is there, got one whose graph a backward pass has freed: use the operator"
            " before loss.backward(), whose gradients are H.gradients, too; or give a closure"
        ) from error
    if "no autograd formula was registered" in text:
        _refuse("a custom operator without a derivative", text.partition("\n")[0], error)


def custom_functions(loss: Tensor) -> list[type[torch.autograd.Function]]:
    """Those written in Python that the graph of the loss passes through.

    Raises:
        RuntimeError: one can be differentiated once; of `once_differentiable` torch may lose the graph without a word.
    """
    functions = {function for node in graph_nodes([loss]) if (function := getattr(type(node), "_forward_cls", None))}
    for function in functions:
        if function.__name__ in _FUNCTIONS:
            _refuse(*_FUNCTIONS[function.__name__])
        if getattr(function.backward, "__code__", None) is _ONCE_DIFFERENTIABLE:
            _refuse(
                f"{function.__name__}, an autograd.Function with @once_differentiable",
                "write its backward with differentiable calls",
            )
    return sorted(functions, key=lambda function: function.__name__)


def warn_of_custom_functions(loss: Tensor, stacklevel: int) -> None:
    """Names what only its writer can vouch for."""
    if names := ", ".join(function.__name__ for function in custom_functions(loss)):
        warnings.warn(
            f"loss: its second derivative is only as right as that of the autograd.Function {names}: see"
            " torch.autograd.gradgradcheck",
            stacklevel=stacklevel + 1,
        )


def _refuse(layer: str, reason: str, error: RuntimeError | None = None) -> NoReturn:
    raise RuntimeError(
        f"loss: expected one that torch can differentiate twice, got one through {layer}: {reason}"
    ) from error
