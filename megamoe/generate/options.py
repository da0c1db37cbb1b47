"""What launch_scripts/generate.py can be told."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from megamoe import arguments
from megamoe.arguments import option


@dataclass(frozen=True, kw_only=True)
class Options:
    """One call of the script. Tuples take several values, each of which is run."""

    model: str = option("qwen3-30b", "a known model with random weights, a checkpoint directory, or a train_lm.py run")
    layers: int = option(0, "transformer layers of a known model; 0: all of them, or two if --tiny")
    tiny: bool = option(False, "scale a known model down so that a CPU runs it")
    experts: tuple[str, ...] = option(("megamoe",), "who runs the experts", "megamoe", "eager", "grouped_mm")
    engine: str = option("auto", "megamoe's engine", "auto", "reference", "staged", "mega")
    recipe: str = option("auto", "megamoe's recipe", "auto", "fp32", "bf16", "fp8_block", "fp8_row", "mxfp4")
    graphs: str = option("auto", "ours: decode steps as CUDA graphs, where that is possible", "auto", "on", "off")
    dtype: str = option("auto", "of the weights; auto: fp32 on CPU, bf16 on GPU", "auto", "fp32", "bf16")
    batch: tuple[int, ...] = option((16,), "requests that run at a time on each rank")
    requests: tuple[int, ...] = option(
        (0,), "requests over all ranks, one number or one for each --batch; 0: two for each that can run at a time"
    )
    prompt: tuple[str, ...] = option((), "texts to continue, instead of random requests")
    prompt_length: int = option(64, "mean tokens of a random prompt; lengths are drawn from half to 1.5 times it")
    new_tokens: int = option(64, "mean tokens to generate for a random prompt; for texts: exactly so many at most")
    prefill_tokens: int = option(8192, "bound on rows times longest prompt of one prefill")
    temperature: float = option(0.0, "0: the likeliest token")
    seed: int = option(0, "of random weights, requests and draws")
    device: str = option("auto", "where to run", "auto", "cpu", "cuda")
    warm_up: str = option("start", "run before, uncounted: a few steps, or all requests as well", "start", "whole")
    results: str = option("", 'folder for rows of benchmark "generate"; empty: none are written')
    stacks_after: int = option(0, "write every thread's Python stack to stderr each so many seconds; 0: never")
    commit: str = option("", "commit that is measured, where the copy has no .git")

    def __post_init__(self) -> None:
        arguments.check_at_least(self, 1, "prompt_length", "new_tokens", "prefill_tokens")
        arguments.check_at_least(self, 0, "layers", "temperature", "stacks_after")
        if not self.batch or min(self.batch) < 1:
            raise ValueError(f"--batch must be at least 1, got {self.batch}")
        if len(self.requests) not in (1, len(self.batch)) or min(self.requests) < 0:
            raise ValueError(
                f"--requests must be one number, or one for each of {len(self.batch)} --batch, from 0, "
                f"got {self.requests}"
            )


def parse(argv: list[str] | None) -> Options:
    """From the command line. Raises ValueError for values that don't fit, SystemExit for an unreadable line."""
    parser = argparse.ArgumentParser(
        prog="generate.py", description="Generate text with a Hugging Face MoE model, its experts spread over ranks."
    )
    return arguments.parse(parser, Options, argv)
