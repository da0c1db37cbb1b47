"""What launch_scripts/generate.py can be told."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass, field
from typing import Any


def _option(default: Any, meaning: str, *choices: str) -> Any:
    return field(default=default, metadata={"help": meaning, "choices": choices or None})


@dataclass(frozen=True, kw_only=True)
class Options:
    """One call of the script. Tuples take several values, each of which is run."""

    model: str = _option("qwen3-30b", "a known model with random weights, a checkpoint directory, or a train_lm.py run")
    layers: int = _option(0, "transformer layers of a known model; 0: all of them, or two if --tiny")
    tiny: bool = _option(False, "scale a known model down so that a CPU runs it")
    experts: tuple[str, ...] = _option(("megamoe",), "who runs the experts", "megamoe", "eager", "grouped_mm")
    engine: str = _option("auto", "megamoe's engine", "auto", "reference", "staged", "mega")
    recipe: str = _option("auto", "megamoe's recipe", "auto", "fp32", "bf16", "fp8_block", "fp8_row", "mxfp4")
    graphs: str = _option("auto", "ours: decode steps as CUDA graphs, where that is possible", "auto", "on", "off")
    dtype: str = _option("auto", "of the weights; auto: fp32 on CPU, bf16 on GPU", "auto", "fp32", "bf16")
    batch: tuple[int, ...] = _option((16,), "requests that run at a time on each rank")
    requests: int = _option(0, "requests over all ranks; 0: two for each that can run at a time")
    prompt: tuple[str, ...] = _option((), "texts to continue, instead of random requests")
    prompt_length: int = _option(64, "mean tokens of a random prompt; lengths are drawn from half to 1.5 times it")
    new_tokens: int = _option(64, "mean tokens to generate for a random prompt; for texts: exactly so many at most")
    prefill_tokens: int = _option(8192, "bound on rows times longest prompt of one prefill")
    temperature: float = _option(0.0, "0: the likeliest token")
    seed: int = _option(0, "of random weights, requests and draws")
    device: str = _option("auto", "where to run", "auto", "cpu", "cuda")
    results: str = _option("", 'folder for rows of benchmark "generate"; empty: none are written')
    stacks_after: int = _option(0, "write every thread's Python stack to stderr each so many seconds; 0: never")
    commit: str = _option("", "commit that is measured, where the copy has no .git")

    def __post_init__(self) -> None:
        for name in ("prompt_length", "new_tokens", "prefill_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        for name in ("layers", "requests", "temperature", "stacks_after"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 0, got {getattr(self, name)}")
        if not self.batch or min(self.batch) < 1:
            raise ValueError(f"--batch must be at least 1, got {self.batch}")


def parse(argv: list[str] | None) -> Options:
    """From the command line. Raises ValueError for values that don't fit, SystemExit for an unreadable line."""
    parser = argparse.ArgumentParser(
        prog="generate.py", description="Generate text with a Hugging Face MoE model, its experts spread over ranks."
    )
    for f in dataclasses.fields(Options):
        default: Any = f.default
        several = isinstance(default, tuple)
        shown = " ".join(map(str, default)) if several else default
        arguments: dict[str, Any] = {
            "default": default,
            "help": f"{f.metadata['help']} (default: {shown if shown != '' else 'empty'})".replace("%", "%%"),
        }
        if isinstance(default, bool):
            arguments["action"] = "store_true"
        else:
            arguments |= {"type": type(default), "choices": f.metadata["choices"]}
        if several:
            arguments |= {"type": type(default[0]) if default else str, "nargs": "+"}
        parser.add_argument("--" + f.name.replace("_", "-"), **arguments)
    given: dict[str, Any] = vars(parser.parse_args(argv))
    for name, value in given.items():
        if isinstance(value, list):
            given[name] = tuple(value)
    return Options(**given)
