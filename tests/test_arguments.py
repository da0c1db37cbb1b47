"""Command lines from dataclasses: types, defaults, several values, switches, what is refused."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import pytest

from megamoe import arguments
from megamoe.arguments import option


@dataclass(frozen=True, kw_only=True)
class Sizes:
    rows: int = option(3, "100% of the rows")
    batch: tuple[int, ...] = option((16,), "requests")
    prompt: tuple[str, ...] = option((), "texts")
    kind: str = option("a", "which", "a", "b")
    few_rows: bool = option(False, "fewer")
    rate: float = option(0.5, "a share")

    def __post_init__(self) -> None:
        arguments.check_at_least(self, 1, "rows")


def parse(*argv: str) -> Sizes:
    return arguments.parse(argparse.ArgumentParser(prog="x", exit_on_error=False), Sizes, list(argv))


def test_defaults_and_values() -> None:
    assert parse() == Sizes()
    given = parse("--rows", "5", "--batch", "1", "2", "--prompt", "x y", "--few-rows", "--kind", "b", "--rate", "1e-2")
    assert given == Sizes(rows=5, batch=(1, 2), prompt=("x y",), few_rows=True, kind="b", rate=0.01)


def test_help_shows_every_default() -> None:
    parser = argparse.ArgumentParser(prog="x")
    arguments.add_options(parser, Sizes)
    text = " ".join(parser.format_help().split())
    for shown in (
        "100% of the rows (default: 3)",
        "requests (default: 16)",
        "texts (default: empty)",
        "(default: False)",
    ):
        assert shown in text


def test_given_only() -> None:
    parser = argparse.ArgumentParser(prog="x")
    arguments.add_options(parser, Sizes, given_only=True)
    assert vars(parser.parse_args(["--rows", "4"])) == {"rows": 4}


@pytest.mark.parametrize("value", ["0", "-1"])
def test_too_little_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match=f"--rows must be at least 1, got {value}"):
        parse("--rows", value)


def test_not_a_number_is_refused() -> None:
    @dataclass(frozen=True)
    class Rate:
        top_rate: float

    with pytest.raises(ValueError, match="--top-rate must be at least 0, got nan"):
        arguments.check_at_least(Rate(float("nan")), 0, "top_rate")


def test_another_choice_is_refused() -> None:
    with pytest.raises(argparse.ArgumentError, match="--kind: invalid choice"):
        parse("--kind", "c")
