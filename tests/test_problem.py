"""``Problem`` refuses what no engine can do, in a sentence with got and expected."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megamoe import Activation, Problem

SIZES: dict[str, Any] = {"hidden": 64, "intermediate": 32, "num_experts": 8, "top_k": 2}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden": 0}, ["hidden", "at least 1", "0"]),
        ({"hidden": 64.0}, ["hidden", "integer", "64.0"]),
        ({"hidden": True}, ["hidden", "integer", "True"]),
        ({"hidden": 60}, ["hidden", "multiple of 8", "60"]),
        ({"intermediate": 12}, ["intermediate", "multiple of 8", "12"]),
        ({"num_experts": 1025}, ["num_experts", "at most 1024", "1025"]),
        ({"top_k": 9}, ["top_k", "num_experts (8)", "9"]),
        ({"num_experts": 64, "top_k": 17}, ["top_k", "at most 16", "17"]),
        ({"world_size": 0}, ["world_size", "at least 1", "0"]),
        ({"max_tokens": -1}, ["max_tokens", "at least 0", "-1"]),
        ({"recipe": "fp4"}, ["recipe", "mxfp4", "'fp4'"]),
        ({"accumulate": "slow"}, ["accumulate", "fast", "'slow'"]),
        ({"weights_applied": "never"}, ["weights_applied", "before_down", "'never'"]),
        ({"activation": "swiglu"}, ["activation", "megamoe.Activation", "'swiglu'"]),
    ],
)
def test_refuses_with_got_and_expected(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        Problem(**{**SIZES, **change})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden": 2880, "intermediate": 2880, "num_experts": 128, "top_k": 4, "bias": True},
        {"hidden": 4096, "intermediate": 14336, "num_experts": 8, "top_k": 2},
        {"hidden": 8, "intermediate": 8, "num_experts": 1, "top_k": 1, "max_tokens": 0},
        {"hidden": 7168, "intermediate": 2048, "num_experts": 1024, "top_k": 16, "world_size": 3},
    ],
    ids=["gpt-oss", "mixtral", "smallest", "most experts"],
)
def test_takes_models_as_they_are(sizes: dict[str, Any]) -> None:
    problem = Problem(**sizes)
    assert problem.w13_rows == 2 * sizes["intermediate"]


def test_w13_of_a_plain_activation_has_no_gate_rows() -> None:
    assert Problem(**SIZES, activation=Activation("relu2")).w13_rows == SIZES["intermediate"]


def test_json_round_trip_keeps_every_field() -> None:
    problem = Problem(
        **SIZES,
        world_size=2,
        max_tokens=7,
        recipe="fp8_block",
        accumulate="fast",
        activation=Activation("swiglu_clamped", limit=5.0, alpha=1.5),
        bias=True,
        weights_applied="before_down",
    )
    default = Problem(**SIZES)
    changed = {f.name for f in dataclasses.fields(Problem) if getattr(problem, f.name) != getattr(default, f.name)}
    assert changed == {f.name for f in dataclasses.fields(Problem)} - SIZES.keys(), "a new field: add it to this test"
    assert Problem.from_json(problem.to_json()) == problem
    assert problem.to_json() == Problem.from_json(problem.to_json()).to_json()


def test_is_frozen_and_hashable() -> None:
    problem = Problem(**SIZES)
    assert hash(problem) == hash(Problem(**SIZES))
    with pytest.raises(dataclasses.FrozenInstanceError):
        problem.hidden = 8  # type: ignore[misc]
