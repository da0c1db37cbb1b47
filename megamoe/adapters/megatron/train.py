"""The training loop of ``launch_scripts/train_megatron.py``: Megatron-Core's own schedule over the main job's text."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megamoe.adapters.megatron import gpt, report
from megamoe.adapters.megatron.on_cpu import emulated_cuda
from megamoe.adapters.megatron.options import Options, parse
from megamoe.adapters.megatron.report import Figures
from megamoe.bench import results
from megamoe.lm.data import Corpus, load_corpus
from megamoe.lm.launch import Meet, launch
from megamoe.lm.world import World


def run(options: Options, world: World, corpus: Corpus, say: Callable[[str], None] = lambda _: None) -> Figures:
    """Train; every rank of the default group calls it.

    Raises:
        ValueError: options that don't fit the number of ranks.
    """
    ep = options.ep or world.size
    if world.size % ep or options.experts % ep:
        raise ValueError(f"--ep ({ep}) must divide the ranks ({world.size}) and --experts ({options.experts})")
    microbatches = options.microbatches(world.size)
    dtype = torch.bfloat16 if report.precision_of(options, world) == "bf16" else torch.float32
    emulation = emulated_cuda() if world.device.type == "cpu" else contextlib.nullcontext()
    with emulation, gpt.model_parallel(options, ep=ep):
        config = gpt.make_config(options, dtype, ep=ep)
        model = gpt.make_model(options, config, world.device)
        optimizer = gpt.make_optimizer(options, config, model)
        if options.load:
            gpt.load(Path(options.load), model, optimizer)
        figures = _loop(options, world, corpus, model, optimizer, microbatches, say)
        if options.save:
            gpt.save(Path(options.save), model, optimizer)
    return figures


def _loop(  # noqa: PLR0917
    options: Options,
    world: World,
    corpus: Corpus,
    model: Any,
    optimizer: Any,
    microbatches: int,
    say: Callable[[str], None],
) -> Figures:
    figures = Figures()
    forward_backward = get_forward_backward_func()
    started = time.perf_counter()
    for step in range(options.steps):
        if step == options.warmup:
            started = _now(world)
        batch = corpus.batch(step=step, seed=options.seed, sequences=options.batch, length=options.length)
        mine = world.share(batch).to(world.device)
        model.zero_grad_buffer()
        optimizer.zero_grad()
        losses = forward_backward(
            forward_step_func=_forward_step,
            data_iterator=iter(torch.split(mine, options.micro_batch)),
            model=[model],
            num_microbatches=microbatches,
            seq_length=options.length,
            micro_batch_size=options.micro_batch,
            forward_only=False,
        )
        _, norm, _ = optimizer.step()
        loss = torch.stack([entry["loss"] for entry in losses]).mean()
        loss = world.sum(loss, "mean of losses") / world.size
        figures.losses.append(float(loss))
        figures.grad_norms.append(float(norm))
        say(f"step {step + 1} loss {figures.losses[-1]:.6f} grad_norm {figures.grad_norms[-1]:.6f}")
    timed = (options.steps - options.warmup) * options.batch * options.length
    figures.tokens_per_second = timed / (_now(world) - started)
    steps = f"steps {options.warmup + 1} to {options.steps}"
    say(f"tokens_per_second {figures.tokens_per_second:.0f} ({options.moe}, {steps})")
    return figures


def _forward_step(batches: Iterator[torch.Tensor], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
    """One micro-batch, for Megatron's schedule: per-token losses [B, S], and what makes a scalar of them."""
    tokens = next(batches)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    B, S = inputs.shape
    positions = torch.arange(S, device=tokens.device).expand(B, S)
    hidden = torch.ones(S, S, dtype=torch.bool, device=tokens.device).triu(1).expand(B, 1, S, S)  # True: not seen
    return model(inputs, positions, hidden, labels=labels), functools.partial(_mean)


def _mean(per_token: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = per_token.float().mean()
    return loss, {"loss": loss.detach()}


def _now(world: World) -> float:
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main(argv: list[str] | None = None) -> int:
    """One rank under torchrun; the exit status."""

    def work(meet: Meet) -> None:
        options = parse(argv)
        world = meet(options.device)
        corpus = load_corpus(Path(options.text) if options.text else None, length=options.length)
        speaks = world.rank == 0
        runs: dict[str, Figures] = {}
        for moe in options.layers_to_run:
            gc.collect()  # models are cycles
            chosen = dataclasses.replace(options, moe=moe)
            runs[moe] = run(chosen, world, corpus, lambda text: print(text, flush=True) if speaks else None)
        if options.results and speaks:
            command = " ".join(["train_megatron.py", *(sys.argv[1:] if argv is None else argv)])
            rows = report.rows(runs, options, world, command)
            path = results.save(Path(options.results), "megatron", rows, machine=world.machine)
            print(f"written: {path}", flush=True)

    return launch("train_megatron.py", work, launched=True)
