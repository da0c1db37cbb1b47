"""What a run of the training job can be told, its command line, and how a resumed run takes up old choices."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from megamoe import arguments
from megamoe.arguments import flag, option

# Choices that shape the parameters or the data; a resumed run cannot change them.
FIXED = ("hidden", "layers", "heads", "experts", "top_k", "intermediate", "length", "text", "seed", "balance")


@dataclass(frozen=True, kw_only=True)
class Options:
    """One training run. Defaults train on two CPU cores in about a minute and a half."""

    text: str = option("", "file or folder to train on; empty: the standard library's sources of this Python")
    out: str = option("", "folder for checkpoints, figures and plot; empty: runs/DATE-TIME")
    seed: int = option(0, "seed of weights, batches and sample")
    device: str = option("auto", "where to train", "auto", "cpu", "cuda")
    engine: str = option("auto", "how the experts are reached", "auto", "reference", "staged", "mega")
    recipe: str = option("auto", "precision; auto: fp32 on CPU, bf16 on GPU", "auto", "fp32", "bf16", "fp8_block")
    hidden: int = option(128, "columns of the model")
    layers: int = option(2, "transformer blocks, each with its own experts")
    heads: int = option(4, "attention heads")
    experts: int = option(8, "experts a layer, over all ranks")
    top_k: int = option(2, "experts a token visits")
    intermediate: int = option(128, "columns inside one expert")
    balance: str = option("aux", "how experts are kept evenly loaded: loss or chosen bias", "aux", "bias")
    length: int = option(128, "bytes in one sequence")
    batch: int = option(16, "sequences in one step, over all ranks")
    steps: int = option(400, "optimiser steps")
    lr: float = option(8e-3, "highest learning rate")
    warmup: int = option(20, "steps until the highest learning rate")
    weight_decay: float = option(0.01, "decoupled weight decay of matrices")
    clip: float = option(1.0, "largest norm of the whole gradient")
    log_every: int = option(20, "steps between figures")
    eval_every: int = option(100, "steps between measurements on held-out text")
    eval_sequences: int = option(256, "held-out sequences measured each time")
    save_every: int = option(200, "steps between checkpoints; 0: none but the last")
    sample: int = option(240, "bytes of text to generate at the end")

    def __post_init__(self) -> None:
        arguments.check_at_least(
            self, 1, "experts", "length", "batch", "steps", "log_every", "eval_every", "eval_sequences"
        )
        arguments.check_at_least(self, 0, "warmup", "save_every", "sample", "lr", "weight_decay")
        if not self.clip > 0:
            raise ValueError(f"--clip must be greater than 0, got {self.clip}")


def parser() -> argparse.ArgumentParser:
    """Parser whose result holds only what was given: defaults come from ``Options`` or from the resumed run."""
    result = argparse.ArgumentParser(
        prog="train_lm.py", description="Train a small byte-level language model with experts spread over ranks."
    )
    result.add_argument(
        "--resume", nargs="?", const="", metavar="PATH",
        help="go on from this checkpoint or the newest one in this folder; without PATH the newest of runs/",
    )  # fmt: skip
    arguments.add_options(result, Options, given_only=True)
    return result


def merge(given: dict[str, Any], saved: dict[str, Any] | None) -> Options:
    """Options of a run: what was given, else what the resumed run had, else the defaults.

    Raises:
        ValueError: a resumed run was given another size, text or seed.
    """
    if saved is not None:
        for name in FIXED:
            if name in given and given[name] != saved[name]:
                raise ValueError(
                    f"{flag(name)} is {saved[name]!r} in the checkpoint, got {given[name]!r}: "
                    f"start a new run to change it"
                )
    return Options(**{**(saved or {}), **given})
