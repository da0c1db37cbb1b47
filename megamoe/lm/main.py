"""From the command line to a finished run."""

from __future__ import annotations

import dataclasses
import datetime
import time
from pathlib import Path
from typing import Any

from megamoe.lm import checkpoint
from megamoe.lm.console import Console
from megamoe.lm.data import load_corpus
from megamoe.lm.launch import Meet, launch
from megamoe.lm.options import Options, merge, parser
from megamoe.lm.plot import plot
from megamoe.lm.train import Trainer
from megamoe.lm.world import World

RUNS = Path("runs")


def main(argv: list[str] | None = None, *, launched: bool) -> int:
    """One rank of a run; the exit status. ``launched``: whether torchrun, or one like it, has set RANK and the rest."""
    given = vars(parser().parse_args(argv))
    resume = given.pop("resume")
    started = time.perf_counter()

    def work(meet: Meet) -> None:
        world = meet(given.get("device", "auto"))
        options, path = world.together(lambda: _choose(given, resume), "reading options")
        run(_place(options, world, path), world, resume=path, started=started)

    interrupted = "interrupted; --resume goes on from the newest checkpoint"
    return launch("train_lm.py", work, launched=launched, interrupted=interrupted)


def run(options: Options, world: World, *, resume: Path | None, started: float) -> None:
    """Train, and leave checkpoint, summary and plot in ``options.out``."""
    place = Path(options.text) if options.text else None
    corpus = world.together(lambda: load_corpus(place, length=options.length), "reading the text")
    digests = world.gather_text(corpus.digest, "comparing texts")
    if len(set(digests)) > 1:
        raise ValueError(f"ranks must read the same text, got digests {', '.join(digests)} of {corpus.source}")
    with Console(steps=options.steps, speaks=world.rank == 0) as console:
        trainer = Trainer(options, world, corpus, console, resume=resume)
        console.say(f"{world.note[:1].upper()}{world.note[1:]}")
        console.say(
            f"{trainer.num_parameters:,} parameters, {options.experts} experts in each of {options.layers} layers; "
            f"{len(corpus.train):,} bytes of {corpus.source}; {options.batch * options.length:,} bytes a step."
        )
        if resume is not None:
            console.say(f"Going on from {resume} at step {trainer.step}.")
        summary = trainer.run()
    if world.rank == 0:
        picture = trainer.out / "training.png"
        plot(
            trainer.history,
            picture,
            unigram=summary["unigram_bits_per_byte"],
            without_experts=summary["without_experts_bits_per_byte"],
            title=f"{summary['parameters']:,} parameters on {world.size} rank{'s' if world.size > 1 else ''}, "
            f"{corpus.source}",
        )
        console.summary(summary, [str(picture), str(checkpoint.find(trainer.out)), str(trainer.out / "summary.json")])
        console.say(f"{time.perf_counter() - started:.0f} seconds in all.")


def _choose(given: dict[str, Any], resume: str | None) -> tuple[Options, Path | None]:
    """Options, and the checkpoint to go on from: ``resume`` names it or its folder, "" takes the newest run."""
    if resume is None:
        return merge(given, None), None
    path = checkpoint.find(Path(resume) if resume else RUNS)
    return merge(given, checkpoint.read_state(path)["options"]), path


def _place(options: Options, world: World, resume: Path | None) -> Options:
    """``options`` with a folder for the results, the same on all ranks."""
    if resume is not None:
        return dataclasses.replace(options, out=options.out or str(resume.parent))
    if not options.out:
        name = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
        return dataclasses.replace(options, out=str(RUNS / world.gather_text(name, "naming the run")[0]))
    if checkpoint.list_checkpoints(Path(options.out)):
        raise ValueError(f"--out {options.out} holds a run already: go on with --resume {options.out}, or name another")
    return options
