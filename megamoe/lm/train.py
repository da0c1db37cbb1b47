"""The training loop: one rank's part of it."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megamoe.checkpoint import load_safetensors
from megamoe.layer import total_aux_loss
from megamoe.lm import checkpoint
from megamoe.lm.build import build_model, experts_zeroed, moe_layers, recipe_of
from megamoe.lm.console import Console
from megamoe.lm.data import Corpus, unigram_bits
from megamoe.lm.measure import BITS, autocast, generate, held_out_bits, summed_loss
from megamoe.lm.optim import count_parameters, learning_rate, make_optimizer, reduce_gradients
from megamoe.lm.options import Options
from megamoe.lm.world import World


@dataclass
class History:
    """Figures of a run, JSON types alone; they travel in the checkpoint, so that a resumed run's plot is whole.

    - ``train``: [step, bits per byte] of each step's batch.
    - ``held_out``: [step, bits per byte].
    - ``load``: [step, [[choices of each expert] of each layer]] since the entry before.
    - ``speed``: [step, tokens per second since the entry before].
    """

    train: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    load: list[tuple[int, list[list[int]]]] = field(default_factory=list)
    speed: list[tuple[int, float]] = field(default_factory=list)


class Trainer:
    """Model, optimiser and figures of one run; every method is called on all ranks.

    Args:
        options: what to train.
        world: the ranks.
        corpus: the text, equal on all ranks.
        console: where rank 0 tells how it goes.
        resume: a checkpoint to go on from.
    """

    def __init__(
        self, options: Options, world: World, corpus: Corpus, console: Console, *, resume: Path | None = None
    ) -> None:
        self.options, self.world, self.corpus, self.console = options, world, corpus, console
        self.low_precision = recipe_of(options, world) != "fp32"
        self.model = build_model(options, world)
        self.num_parameters = count_parameters(self.model, world)
        self.optimizer = make_optimizer(self.model, lr=options.lr, weight_decay=options.weight_decay)
        self.history = History()
        self.step = 0
        self.out = Path(options.out)
        self.held_out = corpus.evaluation(sequences=options.eval_sequences, length=options.length)
        if resume is not None:
            state = checkpoint.read_state(resume)
            if state["corpus"] != corpus.digest:
                raise ValueError(
                    f"the text differs from the one the checkpoint was trained on: got digest {corpus.digest}, "
                    f"expected {state['corpus']}"
                )
            self.step = int(state["step"])
            self.history = History(**state["history"])
            load_safetensors(self.model, resume, self.optimizer)

    def run(self) -> dict[str, Any]:
        """Train to ``options.steps``; then measure, sample and save. Returns the summary that is written to ``out``."""
        o = self.options
        since, tokens = time.perf_counter(), 0
        while self.step < o.steps:
            loss = self.train_step()
            tokens += o.batch * o.length
            last = self.step == o.steps
            if self.step % o.log_every == 0 or last:
                seconds = time.perf_counter() - since
                self._log(loss, tokens / seconds)
                since, tokens = time.perf_counter(), 0
            if self.step % o.eval_every == 0 or last:
                self.history.held_out.append((self.step, self.evaluate()))
                self.console.held_out(self.step, self.history.held_out[-1][1])
            if last or (o.save_every and self.step % o.save_every == 0):
                self.save()
        return self._finish()

    def train_step(self) -> float:
        """One optimiser step on one global batch; the batch's loss in bits per byte."""
        o, world = self.options, self.world
        batch = self.corpus.batch(step=self.step, seed=o.seed, sequences=o.batch, length=o.length)
        mine = world.share(batch).to(world.device)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, steps=o.steps, warmup=o.warmup, highest=o.lr)
        with autocast(world, enabled=self.low_precision):
            # The mean over ranks of this is the mean over the batch, also where ranks have different numbers of rows.
            loss = summed_loss(self.model, mine) * (world.size / (o.batch * o.length))
        torch.autograd.backward(loss + total_aux_loss(self.model))
        whole, _ = reduce_gradients(self.model, world, loss, clip=o.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if o.balance == "bias":
            for layer in moe_layers(self.model):
                layer.router.update_bias()
        self.step += 1
        bits = whole * BITS
        self.history.train.append((self.step, bits))
        self.console.step(self.step, bits)
        return bits

    def evaluate(self) -> float:
        """Loss on the held-out text in bits per byte."""
        return held_out_bits(
            self.model, self.world, self.held_out, sequences=self.options.batch, low_precision=self.low_precision
        )

    def save(self) -> Path:
        """Write a checkpoint of this step into ``out``."""
        state = {
            "step": self.step,
            "options": dataclasses.asdict(self.options),
            "corpus": self.corpus.digest,
            "history": dataclasses.asdict(self.history),
        }
        return checkpoint.save(self.out, self.model, self.optimizer, state, self.world)

    def _log(self, loss: float, tokens_per_second: float) -> None:
        counts = torch.stack([layer.expert_counts(running=True) for layer in moe_layers(self.model)])
        for layer in moe_layers(self.model):
            layer.reset_counts()
        load = self.world.sum(counts, "expert load").tolist()
        self.history.load.append((self.step, load))
        self.history.speed.append((self.step, tokens_per_second))
        self.console.log(self.step, loss, tokens_per_second, imbalance(load))

    def _finish(self) -> dict[str, Any]:
        o = self.options
        with experts_zeroed(self.model):
            zeroed = self.evaluate()
        prompt = b"def "
        text = generate(
            self.model, self.world, prompt, count=o.sample, length=o.length, seed=o.seed,
            low_precision=self.low_precision,
        )  # fmt: skip
        summary = {
            "steps": self.step,
            "ranks": self.world.size,
            "device": str(self.world.device),
            "parameters": self.num_parameters,
            "held_out_bits_per_byte": self.history.held_out[-1][1] if self.history.held_out else self.evaluate(),
            "without_experts_bits_per_byte": zeroed,
            "unigram_bits_per_byte": unigram_bits(self.corpus.held_out),
            "load_max_over_mean": imbalance(self.history.load[-1][1]) if self.history.load else None,
            "sample": text.decode("utf-8", errors="replace"),
        }
        if self.world.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        return summary


def imbalance(load: list[list[int]]) -> float:
    """Largest over mean number of choices of an expert, of the layer where that is worst; 1 when balanced."""
    return max(max(layer) * len(layer) / max(sum(layer), 1) for layer in load)
