"""What a run of the training job can be told, its command line, and how a resumed run takes up old choices."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass, field
from typing import Any

# Choices that shape the parameters or the data; a resumed run cannot change them.
FIXED = ("hidden", "layers", "heads", "experts", "top_k", "intermediate", "length", "text", "seed", "balance")


def _option(default: Any, meaning: str, *choices: str) -> Any:
    return field(default=default, metadata={"help": meaning, "choices": choices or None})


@dataclass(frozen=True, kw_only=True)
class Options:
    """One training run. Defaults train on two CPU cores in about a minute and a half."""

    text: str = _option("", "file or folder to train on; empty: the standard library's sources of this Python")
    out: str = _option("", "folder for checkpoints, figures and plot; empty: runs/DATE-TIME")
    seed: int = _option(0, "seed of weights, batches and sample")
    device: str = _option("auto", "where to train", "auto", "cpu", "cuda")
    engine: str = _option("auto", "how the experts are reached", "auto", "reference", "staged", "mega")
    recipe: str = _option("auto", "precision; auto: fp32 on CPU, bf16 on GPU", "auto", "fp32", "bf16", "fp8_block")
    hidden: int = _option(128, "columns of the model")
    layers: int = _option(2, "transformer blocks, each with its own experts")
    heads: int = _option(4, "attention heads")
    experts: int = _option(8, "experts a layer, over all ranks")
    top_k: int = _option(2, "experts a token visits")
    intermediate: int = _option(128, "columns inside one expert")
    balance: str = _option("aux", "how experts are kept evenly loaded: loss or chosen bias", "aux", "bias")
    length: int = _option(128, "bytes in one sequence")
    batch: int = _option(16, "sequences in one step, over all ranks")
    steps: int = _option(400, "optimiser steps")
    lr: float = _option(8e-3, "highest learning rate")
    warmup: int = _option(20, "steps until the highest learning rate")
    weight_decay: float = _option(0.01, "decoupled weight decay of matrices")
    clip: float = _option(1.0, "largest norm of the whole gradient")
    log_every: int = _option(20, "steps between figures")
    eval_every: int = _option(100, "steps between measurements on held-out text")
    eval_sequences: int = _option(256, "held-out sequences measured each time")
    save_every: int = _option(200, "steps between checkpoints; 0: none but the last")
    sample: int = _option(240, "bytes of text to generate at the end")

    def __post_init__(self) -> None:
        for name in ("experts", "length", "batch", "steps", "log_every", "eval_every", "eval_sequences"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup", "save_every", "sample", "lr", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 0, got {getattr(self, name)}")
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
    for f in dataclasses.fields(Options):
        result.add_argument(
            "--" + f.name.replace("_", "-"),
            type=type(f.default),
            choices=f.metadata["choices"],
            default=argparse.SUPPRESS,
            help=f"{f.metadata['help']} (default: {f.default if f.default != '' else 'empty'})",
        )
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
                    f"--{name.replace('_', '-')} is {saved[name]!r} in the checkpoint, got {given[name]!r}: "
                    f"start a new run to change it"
                )
    return Options(**{**(saved or {}), **given})
