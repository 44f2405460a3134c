"""Command line from a frozen dataclass: each field is an option, the instance is the run's configuration."""

# ruff: noqa: RUF009 - option() is dataclasses.field with help attached
from __future__ import annotations

import argparse
import dataclasses
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from common.recording import RunFolder

Config = TypeVar("Config", bound="BaseConfig")


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] | None = None,
    metavar: str | None = None,
    may_change: bool = False,
) -> Any:
    """A dataclass field that becomes `--kebab-case`.

    Args:
        default: its value when the option is not given.
        help: one line for `--help`.
        choices: the allowed values.
        metavar: the value's name in `--help`.
        may_change: whether `--resume` accepts another value than the interrupted run's.
    """
    metadata = {"help": help, "choices": choices, "metavar": metavar, "may_change": may_change}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """The options every script has. Subclasses check their own values in `__post_init__`."""

    out: Path = option(Path("runs/run"), "run folder: config, metrics, summary, figure, checkpoint", metavar="DIR")
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"), may_change=True)
    seed: int = option(0, "seed of everything random")
    resume: bool = option(False, "continue the run in --out exactly where it stopped", may_change=True)


def parse_config(
    config_class: type[Config],
    description: str,
    argv: Sequence[str] | None = None,
    *,
    defaults: Mapping[str, Any] | None = None,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
) -> Config:
    """Read the command line into a `config_class`; a bad value ends the program with a usage error.

    With `--resume` the options default to those of the run in `--out`, so none has to be repeated; giving one
    a value that would change the trajectory is an error.

    Args:
        config_class: its fields are the options.
        description: shown by `--help`.
        argv: the arguments; None: those of the program.
        defaults: a script's own defaults, before those of the class.
        presets: named sets of defaults that `--preset` chooses from; options given beside it win.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser(config_class, description)
    parser.set_defaults(**(defaults or {}))
    if presets:
        parser.add_argument("--preset", choices=tuple(presets), help="a named set of defaults instead of the paper's")
    namespace = parser.parse_args(arguments)
    saved: dict[str, Any] = {}
    if namespace.resume:
        saved = _saved_config(parser, namespace.out)
        parser.set_defaults(**{key: value for key, value in saved.items() if key not in ("out", "resume")})
    if presets and namespace.preset:
        parser.set_defaults(**presets[namespace.preset])
    values = vars(parser.parse_args(arguments))
    values.pop("preset", None)  # what it stands for is recorded instead
    try:
        config = config_class(**values)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    _refuse_changes(parser, config, saved)
    return config


def as_dict(config: BaseConfig) -> dict[str, Any]:
    """The configuration in JSON's types."""
    values = dataclasses.asdict(config)
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one; asking for an absent CUDA is a ValueError."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got 'cuda', but torch finds no CUDA device; use 'cpu' or 'auto'")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def open_run(config: BaseConfig) -> RunFolder:
    """The run folder of `config`, with config.json written.

    A folder that holds another run, or an unfinished one, is refused unless `resume` is set, so that no work
    is lost by a forgotten option. A finished run of the same configuration is computed anew.
    """
    folder = RunFolder(config.out)
    if folder.has_checkpoint() and not config.resume:
        other = _changes(config, folder.read_config())
        unfinished = not (folder / "summary.json").exists() or not folder.read_summary().get("finished", False)
        if other or unfinished:
            reason = f"a run with other options ({', '.join(other)})" if other else "an unfinished run"
            hint = "" if other else "; --resume continues it"
            raise ValueError(f"out: {config.out} holds {reason}{hint}; delete it or choose another --out")
    folder.write_config(as_dict(config))
    return folder


def _parser(config_class: type[BaseConfig], description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        flag = "--" + field.name.replace("_", "-")
        kind = _value_type(hints[field.name])
        if kind is bool:
            action: Any = "store_true" if field.default is False else argparse.BooleanOptionalAction
            parser.add_argument(flag, action=action, default=field.default, help=field.metadata["help"])
        else:
            parser.add_argument(
                flag,
                type=_optional(kind) if type(None) in typing.get_args(hints[field.name]) else kind,
                default=field.default,
                help=field.metadata["help"],
                choices=field.metadata["choices"],
                metavar=field.metadata["metavar"] or (None if field.metadata["choices"] else kind.__name__.upper()),
            )
    return parser


def _value_type(hint: Any) -> type:
    """The one type an option's text is read as: `int | None` is read as int."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
    return typing.cast(type, hint)


def _optional(kind: type) -> Callable[[str], Any]:
    """Reads 'none' as None and anything else as `kind`."""

    def read(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    read.__name__ = kind.__name__  # argparse names it in its error
    return read


def _saved_config(parser: argparse.ArgumentParser, out: Path) -> dict[str, Any]:
    if not (out / "config.json").exists() or not (out / "checkpoint.pt").exists():
        parser.error(f"--resume: {out} holds no run to continue (config.json and checkpoint.pt expected)")
    return RunFolder(out).read_config()


def _refuse_changes(parser: argparse.ArgumentParser, config: BaseConfig, saved: dict[str, Any]) -> None:
    changed = _changes(config, saved) if saved else []
    if changed:
        given = as_dict(config)
        name = changed[0]
        parser.error(
            f"--resume: --{name.replace('_', '-')} is {saved.get(name)!r} in the run in {config.out}, "
            f"got {given[name]!r}; leave the option out or start a new run"
        )


def _changes(config: BaseConfig, saved: dict[str, Any]) -> list[str]:
    """Names of the options that differ from a saved configuration in a way that makes it another run."""
    given = as_dict(config)
    fixed = [f.name for f in dataclasses.fields(config) if not f.metadata["may_change"] and f.name != "out"]
    return [name for name in fixed if given[name] != saved.get(name)]
