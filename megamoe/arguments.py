"""Command lines of the launch scripts: a frozen dataclass whose fields are the options.

@dataclass(frozen=True, kw_only=True)
class Options:
    batch: tuple[int, ...] = option((16,), "requests at a time")   # --batch 1 16
    engine: str = option("auto", "the engine", "auto", "mega")     # one of these
    tiny: bool = option(False, "a small model")                    # a switch
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import field
from typing import Any, TypeVar

T = TypeVar("T")


def option(default: Any, meaning: str, *choices: str) -> Any:
    """A field: its default, whose type is the option's, and what ``--help`` says. A tuple takes several values."""
    return field(default=default, metadata={"help": meaning, "choices": choices or None})


def add_options(parser: argparse.ArgumentParser, options: type[Any], *, given_only: bool = False) -> None:
    """An option for each field; with ``given_only`` the result of parsing leaves out what was not given."""
    for f in dataclasses.fields(options):
        default: Any = f.default
        several = isinstance(default, tuple)
        shown = " ".join(map(str, default)) if several else default
        arguments: dict[str, Any] = {
            "default": argparse.SUPPRESS if given_only else default,
            "help": f"{f.metadata['help']} (default: {shown if shown != '' else 'empty'})".replace("%", "%%"),
        }
        if isinstance(default, bool):
            arguments["action"] = "store_true"
        else:
            arguments |= {"type": type(default), "choices": f.metadata["choices"]}
        if several:
            arguments |= {"type": type(default[0]) if default else str, "nargs": "+"}
        parser.add_argument(flag(f.name), **arguments)


def parse(parser: argparse.ArgumentParser, options: type[T], argv: list[str] | None) -> T:
    """``options`` from the command line (None: this process's). ``parser`` has nothing else.

    Raises:
        ValueError: values that don't fit.
        SystemExit: an unreadable line.
    """
    add_options(parser, options)
    given = vars(parser.parse_args(argv))
    return options(**{name: tuple(v) if isinstance(v, list) else v for name, v in given.items()})


def check_at_least(options: Any, least: int, *names: str) -> None:
    """Raises ValueError if one of the fields ``names`` is less (or not a number)."""
    for name in names:
        if not getattr(options, name) >= least:
            raise ValueError(f"{flag(name)} must be at least {least}, got {getattr(options, name)}")


def flag(name: str) -> str:
    """ "new_tokens" -> "--new-tokens"."""
    return f"--{name.replace('_', '-')}"
