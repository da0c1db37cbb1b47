"""From the command line to figures and texts: one rank's part."""

from __future__ import annotations

import faulthandler
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from megamoe.generate import graphs
from megamoe.generate.console import Console
from megamoe.generate.loop import Generator, run
from megamoe.generate.measure import summarise
from megamoe.generate.options import Options, parse
from megamoe.generate.report import Report, Run
from megamoe.generate.requests import Request, workload
from megamoe.generate.rows import RowBatch
from megamoe.generate.scheduler import Scheduler
from megamoe.lm.launch import Meet, launch
from megamoe.lm.world import World

# cuDNN's attention, torch's first choice on Hopper, makes a plan for each new length: with caches that grow, each step.
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_WARM_UP_TOKENS = 4  # to generate for each request of _warm_up; a rank without one makes up as long a prompt


def main(argv: list[str] | None = None, *, launched: bool) -> int:
    """One rank of a call; the exit status. ``launched``: whether torchrun, or one like it, has set RANK and so on."""

    def work(meet: Meet) -> None:
        options = parse(argv)
        if options.stacks_after:
            faulthandler.dump_traceback_later(options.stacks_after, repeat=True)
        command = " ".join(["generate.py", *(sys.argv[1:] if argv is None else argv)])
        try:
            generate(options, meet(options.device), command=command)
        finally:
            faulthandler.cancel_dump_traceback_later()

    return launch("generate.py", work, launched=launched)


@sdpa_kernel(_ATTENTION)
def generate(options: Options, world: World, *, command: str) -> list[Run]:
    """Run every batch size with every implementation, tell, and write rows if asked; collective.

    Raises:
        ValueError: something that can't be done, on every rank.
    """
    from megamoe.adapters import transformers as megamoe_hf
    from megamoe.adapters.transformers import choice, models

    console = Console(speaks=world.rank == 0)
    console.say(f"{world.note[:1].upper()}{world.note[1:]}")
    began = time.perf_counter()
    settings = megamoe_hf.register(engine=options.engine, recipe=cast(Any, options.recipe))
    fp32 = options.dtype == "fp32" or (options.dtype == "auto" and world.device.type == "cpu")
    loaded = world.together(
        lambda: models.load(
            options.model, world, layers=options.layers or None, tiny=options.tiny,
            dtype=torch.float32 if fp32 else torch.bfloat16, seed=options.seed,
        ),
        "loading the model",
    )  # fmt: skip
    for name in options.experts:
        world.together(lambda n=name: choice.choose(loaded.model, n, world, settings), "choosing experts")  # type: ignore[misc]
    console.say(f"{loaded.name}, loaded in {time.perf_counter() - began:.1f} s; experts: {', '.join(options.experts)}.")
    counts = options.requests * (len(options.batch) if len(options.requests) == 1 else 1)
    works = [
        _requests(options, loaded, count or 2 * batch * world.size)
        for batch, count in zip(options.batch, counts, strict=True)
    ]
    longest = max(len(r.prompt) for requests in works for r in requests)
    settings = replace(settings, max_tokens=max(options.prefill_tokens, longest, *options.batch))
    width = max(2 * _WARM_UP_TOKENS, *(len(r.prompt) + r.max_new_tokens for requests in works for r in requests))
    captured, note = graphs.prepare(options, loaded.model, world, settings, width=width)
    console.say(note)
    report = Report(options, loaded, world, console, command, graphs=captured is not None)
    for batch, requests in zip(options.batch, works, strict=True):
        for name in options.experts:
            choice.choose(loaded.model, name, world, settings)
            if captured is not None and name == "megamoe":
                captured.direct.install()
            make = _maker(options, loaded, world, batch, captured if name == "megamoe" else None)
            mine = [replace(r, output=[]) for r in requests[world.rank :: world.size]]
            warmed = _warm_up(make, mine[:batch], mine if options.warm_up == "whole" else None, world)
            generator = make(mine)
            _meet(world)
            with console.progress(f"{name}, batch {batch}", sum(r.max_new_tokens for r in mine)) as watch:
                started = time.perf_counter()
                records = run(generator, world, watch=watch)
                seconds = time.perf_counter() - started
            report.add(name, batch, warmed, summarise(records, seconds, world))
            if options.prompt:
                _tell(options, loaded, generator.scheduler.finished, world, console)
            del generator, make
            gc.collect()
    if captured is not None:
        captured.direct.close()
    report.close()
    return report.runs


def _requests(options: Options, loaded: Any, count: int) -> list[Request]:
    if not options.prompt:
        return workload(
            count,
            prompt_length=options.prompt_length,
            new_tokens=options.new_tokens,
            vocabulary=loaded.vocabulary,
            seed=options.seed,
        )
    if loaded.encode is None:
        raise ValueError(f"--prompt needs a model with a tokenizer, {loaded.name} has none: leave it out")
    return [
        Request(id=i, prompt=loaded.encode(text), max_new_tokens=options.new_tokens)
        for i, text in enumerate(options.prompt)
    ]


def _maker(
    options: Options, loaded: Any, world: World, batch: int, captured: graphs.Captured | None
) -> Callable[[list[Request]], Generator]:
    from megamoe.adapters.transformers import lend_experts
    from megamoe.adapters.transformers.models import make_cache

    kv = None if captured is None else captured.rows(batch)  # one for all: its graphs serve again

    def make(requests: list[Request]) -> Generator:
        scheduler = Scheduler(requests, max_rows=batch, max_prefill_tokens=options.prefill_tokens, stop=loaded.stop)
        return Generator(
            loaded.model,
            scheduler,
            make_cache=make_cache,
            idle=(lambda: lend_experts(loaded.model)) if world.size > 1 else (lambda: None),
            device=world.device,
            temperature=options.temperature,
            seed=options.seed,
            kv=kv,
            check=(lambda: None) if captured is None else captured.direct.check,
        )

    return make


def _warm_up(
    make: Callable[[list[Request]], Generator], first: list[Request], whole: list[Request] | None, world: World
) -> float:
    """A few steps of those that begin, then ``whole``, so that what is made on first use is made; seconds it took."""
    began = time.perf_counter()
    few = [replace(r, max_new_tokens=min(r.max_new_tokens, _WARM_UP_TOKENS)) for r in first]
    few = few or [Request(id=0, prompt=[0] * _WARM_UP_TOKENS, max_new_tokens=_WARM_UP_TOKENS)]

    def serve(requests: list[Request]) -> Generator:
        generator = make([replace(r, output=[]) for r in requests])
        run(generator, world)
        return generator

    generator = serve(few)
    if isinstance(generator.kv, RowBatch):
        generator.kv.capture(generator.call)
        # Capturing has given torch's spare memory back, and the first replay of a graph sets it up.
        serve(few)
    if whole is not None:
        serve(whole)
    return time.perf_counter() - began


def _meet(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    world.gather_text("", "starting together")


def _tell(options: Options, loaded: Any, finished: list[Request], world: World, console: Console) -> None:
    texts = world.gather_text(json.dumps({r.id: r.output for r in finished}), "gathering texts")
    outputs = {int(i): ids for text in texts for i, ids in json.loads(text).items()}
    for i, prompt in enumerate(options.prompt):
        console.text(prompt, loaded.decode(outputs[i]))
