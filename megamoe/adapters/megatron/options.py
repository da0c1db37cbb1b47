"""Options of ``launch_scripts/train_megatron.py``."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from megamoe import arguments
from megamoe.arguments import option


@dataclass(frozen=True)
class Options:
    """What to train, and through which MoE layer."""

    moe: str = option("megamoe", "whose MoE layer; both: one after the other", "megamoe", "stock", "both")
    ep: int = option(0, "expert-parallel ranks; 0: all")
    device: str = option("auto", "where to train", "auto", "cpu", "cuda")
    precision: str = option("auto", "auto: fp32 on CPU, bf16 on GPU", "auto", "fp32", "bf16")
    engine: str = option("auto", "how our experts are reached", "auto", "reference", "staged", "mega")
    distributed_optimizer: bool = option(False, "shard the optimiser over data-parallel ranks")
    recompute: str = option("none", "what to compute again in backward", "none", "full", "moe", "shared_experts")
    shared: int = option(0, "columns of the shared experts; 0: none")
    layers: int = option(2, "transformer layers")
    hidden: int = option(64, "columns of the model")
    heads: int = option(4, "attention heads")
    experts: int = option(8, "experts a layer, over all ranks")
    top_k: int = option(2, "experts a token visits")
    intermediate: int = option(64, "columns inside one expert")
    length: int = option(64, "bytes in one sequence")
    batch: int = option(16, "sequences in one step, over all ranks")
    micro_batch: int = option(4, "sequences in one forward of one rank")
    steps: int = option(20, "optimiser steps")
    warmup: int = option(3, "first steps left out of tokens per second")
    lr: float = option(1e-3, "learning rate")
    clip: float = option(1.0, "largest norm of the whole gradient")
    aux_loss: float = option(1e-2, "coefficient of the balance loss")
    seed: int = option(0, "seed of weights and batches")
    text: str = option("", "file or folder to train on; empty: the standard library's sources of this Python")
    save: str = option("", "folder for a distributed checkpoint of the end; empty: none")
    load: str = option("", "folder of a distributed checkpoint to start from; empty: none")
    results: str = option("", 'folder for rows of benchmark "megatron"; empty: none are written')
    commit: str = option("", "commit that is measured, where the copy has no .git")

    def __post_init__(self) -> None:
        arguments.check_at_least(self, 1, "layers", "heads", "experts", "length", "batch", "micro_batch", "steps")
        if not 0 <= self.warmup < self.steps:
            raise ValueError(f"--warmup must be between 0 and --steps - 1 ({self.steps - 1}), got {self.warmup}")
        if self.hidden % self.heads:
            raise ValueError(f"--hidden ({self.hidden}) must be divisible by --heads ({self.heads})")
        if self.moe == "both" and self.save:
            raise ValueError("--save holds one model: use it with --moe megamoe or --moe stock, not both")

    @property
    def layers_to_run(self) -> tuple[str, ...]:
        """Whose MoE layers are trained, in order."""
        return ("stock", "megamoe") if self.moe == "both" else (self.moe,)

    def microbatches(self, data_ranks: int) -> int:
        """Forwards of one rank in one step. Raises ValueError if the batch can't be divided."""
        if self.batch % (self.micro_batch * data_ranks):
            raise ValueError(
                f"--batch ({self.batch}) must be divisible by --micro-batch ({self.micro_batch}) times the ranks "
                f"({data_ranks})"
            )
        return self.batch // (self.micro_batch * data_ranks)


def parse(argv: list[str] | None) -> Options:
    """From the command line. Raises ValueError for values that don't fit, SystemExit for an unreadable line."""
    parser = argparse.ArgumentParser(
        prog="train_megatron.py", description="Train a small byte-level GPT with experts through Megatron-Core."
    )
    return arguments.parse(parser, Options, argv)
