"""Named layers that tests, benchmarks and ``python -m megamoe plan`` share: sizes of models people run."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from megamoe.activation import Activation
from megamoe.problem import Problem, Recipe


@dataclass(frozen=True, kw_only=True)
class Case:
    """One layer: H, I, E, K and the reason it is looked at."""

    name: str
    hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    why: str
    activation: Activation = Activation()  # noqa: RUF009 - frozen
    bias: bool = False

    def problem(self, *, world_size: int = 1, max_tokens: int = 8192, recipe: Recipe = "bf16") -> Problem:
        """The case as a Problem of ``world_size`` ranks."""
        return Problem(
            hidden=self.hidden,
            intermediate=self.intermediate,
            num_experts=self.num_experts,
            top_k=self.top_k,
            world_size=world_size,
            max_tokens=max_tokens,
            recipe=recipe,
            activation=self.activation,
            bias=self.bias,
        )


_ALL = (
    Case(name="flash", hidden=4096, intermediate=2048, num_experts=256, top_k=6, why="DeepSeek-V4-Flash"),
    Case(
        name="flash8",
        hidden=4096,
        intermediate=2048,
        num_experts=64,
        top_k=6,
        why="flash with the 32 experts a rank holds at EP8, on 2 ranks",
    ),
    Case(name="dsv3", hidden=7168, intermediate=2048, num_experts=256, top_k=8, why="DeepSeek-V3"),
    Case(
        name="dsv3-8",
        hidden=7168,
        intermediate=2048,
        num_experts=64,
        top_k=8,
        why="DeepSeek-V3, one rank's load at EP8, on 2 ranks",
    ),
    Case(name="pro", hidden=7168, intermediate=3072, num_experts=384, top_k=6, why="DeepSeek-V4-Pro"),
    Case(
        name="pro8",
        hidden=7168,
        intermediate=3072,
        num_experts=96,
        top_k=6,
        why="DeepSeek-V4-Pro, one rank's load at EP8, on 2 ranks",
    ),
    Case(
        name="qwen3",
        hidden=2048,
        intermediate=768,
        num_experts=128,
        top_k=8,
        why="Qwen3-30B-A3B: small experts, hard on communication and epilogues",
    ),
    Case(
        name="gptoss",
        hidden=2880,
        intermediate=2880,
        num_experts=128,
        top_k=4,
        why="gpt-oss-120b: not a multiple of 128, clamped SwiGLU, bias, MXFP4",
        activation=Activation("swiglu_clamped"),
        bias=True,
    ),
    Case(
        name="mixtral",
        hidden=4096,
        intermediate=14336,
        num_experts=8,
        top_k=2,
        why="Mixtral 8x7B: few large experts",
    ),
)
CASES = {case.name: case for case in _ALL}


def case_of(text: str) -> Case:
    """A named case, or one of sizes "H/I/E/K" ("7168/2048/256/8") with SwiGLU and no bias.

    Raises:
        ValueError: neither.
    """
    if text in CASES:
        return CASES[text]
    sizes = text.split("/")
    if len(sizes) != 4 or not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise ValueError(f"a case must be one of {', '.join(CASES)}, or H/I/E/K in numbers, got {text!r}")
    hidden, intermediate, num_experts, top_k = map(int, sizes)
    return Case(
        name=text, hidden=hidden, intermediate=intermediate, num_experts=num_experts, top_k=top_k, why="asked for"
    )


def case_name(text: str) -> str:
    """``text`` if ``case_of`` knows it; for command lines."""
    try:
        return case_of(text).name
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
