"""A tiny run of the main job, and its script as a process: what its tests on CPU and GPU share."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import torch

from megamoe.lm.console import Console
from megamoe.lm.data import Corpus, load_corpus, standard_library
from megamoe.lm.options import Options
from megamoe.lm.train import Trainer
from megamoe.lm.world import World, from_group

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "launch_scripts" / "train_lm.py"
TINY = Options(
    device="cpu",
    hidden=32,
    layers=2,
    heads=2,
    experts=12,
    top_k=2,
    intermediate=16,
    length=24,
    batch=8,
    steps=12,
    warmup=2,
    log_every=4,
    eval_every=6,
    eval_sequences=20,
    save_every=5,
    sample=12,
)
ALONE = World(0, 1, None, torch.device("cpu"), "")


def corpus(options: Options = TINY) -> Corpus:
    if options.text:
        return load_corpus(Path(options.text), length=options.length)
    files = standard_library()[:20]
    data = [torch.frombuffer(bytearray(f.read_bytes()[:4000]), dtype=torch.uint8) for f in files]
    return Corpus(torch.cat(data[:-1]), data[-1], "twenty pieces")


def train(options: Options, world: World, resume: Path | None = None) -> tuple[Trainer, dict[str, object]]:
    with Console(steps=options.steps, speaks=False) as console:
        trainer = Trainer(options, world, corpus(options), console, resume=resume)
        return trainer, trainer.run()


def train_rank(rank, world_size, group, options, resume=None):
    trainer, summary = train(options, from_group(device="cpu"), resume)
    return dataclasses.asdict(trainer.history), summary


def curve(history: dict[str, list[tuple[int, float]]]) -> list[float]:
    return [bits for _, bits in history["train"]]


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "--device", "cpu", *arguments]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def torchrun(num_ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    return subprocess.run(
        [*launcher, str(SCRIPT), *arguments],
        env=environment(), capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip


def arguments_of(options: Options) -> list[str]:
    given = {name: value for name, value in dataclasses.asdict(options).items() if value != "" and name != "device"}
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
