"""From the command line to figures and texts: one rank's part."""

from __future__ import annotations

import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from megamoe.bench import results
from megamoe.engines.choose import best, offered
from megamoe.errors import MegaMoEError
from megamoe.generate import graphs
from megamoe.generate.console import Console
from megamoe.generate.loop import Generator, run
from megamoe.generate.measure import Figures, summarise
from megamoe.generate.options import Options, parse
from megamoe.generate.requests import Request, workload
from megamoe.generate.rows import RowBatch
from megamoe.generate.scheduler import Scheduler
from megamoe.lm.world import World, join, leave
from megamoe.problem import Problem

_WARM_UP_WIDTH = 32  # tokens of the longest request of _warm_up

Run = tuple[str, int, Figures]  # who ran the experts, batch, figures


def main(argv: list[str] | None = None, *, launched: bool) -> int:
    """One rank of a call; the exit status. ``launched``: whether torchrun, or one like it, has set RANK and so on."""
    world = None
    try:
        options = parse(argv)
        world = join(launched=launched, device=options.device)
        generate(options, world, command=" ".join(["generate.py", *(sys.argv[1:] if argv is None else argv)]))
    except ValueError as error:
        if world is None or world.rank == 0:
            print(f"generate.py: {error}", file=sys.stderr, flush=True)
        return leave(world, 2)
    except (MegaMoEError, OSError) as error:
        print(f"rank {world.rank if world else '?'} stops: {error}", file=sys.stderr, flush=True)
        return leave(world, 1)
    except Exception:
        traceback.print_exc()
        return leave(world, 1)
    if world.group is not None:
        dist.destroy_process_group()
    return 0


def generate(options: Options, world: World, *, command: str) -> list[Run]:
    """Run every batch size with every implementation, tell, and write rows if asked; collective.

    Raises:
        ValueError: something that can't be done, on every rank.
    """
    from megamoe.adapters import transformers as megamoe_hf
    from megamoe.adapters.transformers import choice, models

    console = Console(speaks=world.rank == 0)
    console.say(f"{world.note[:1].upper()}{world.note[1:]}")
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
    console.say(f"{loaded.name}; experts: {', '.join(options.experts)}.")
    runs: list[Run] = []
    works = [_requests(options, loaded, batch * world.size) for batch in options.batch]
    longest = max(len(r.prompt) for requests in works for r in requests)
    settings = replace(settings, max_tokens=max(options.prefill_tokens, longest, *options.batch))
    width = max(_WARM_UP_WIDTH, *(len(r.prompt) + r.max_new_tokens for requests in works for r in requests))
    captured, note = graphs.prepare(options, loaded.model, world, settings, width=width)
    console.say(note)
    for batch, requests in zip(options.batch, works, strict=True):
        for name in options.experts:
            choice.choose(loaded.model, name, world, settings)
            if captured is not None and name == "megamoe":
                captured.direct.install()
            make = _maker(options, loaded, world, batch, captured if name == "megamoe" else None)
            _warm_up(make, loaded.vocabulary, batch, world)
            mine = [_copy(r) for r in requests[world.rank :: world.size]]
            generator = make(mine)
            _meet(world)
            with console.progress(f"{name}, batch {batch}", sum(r.max_new_tokens for r in mine)) as watch:
                started = time.perf_counter()
                records = run(generator, world, watch=watch)
                seconds = time.perf_counter() - started
            runs.append((name, batch, summarise(records, seconds, world)))
            if options.prompt:
                _tell(options, loaded, generator.scheduler.finished, world, console)
            del generator, make
            gc.collect()
    if captured is not None:
        captured.direct.close()
    console.figures(runs)
    if options.results and world.rank == 0:
        new = rows(runs, options, loaded, world, command, graphs=captured is not None)
        path = results.save(Path(options.results), "generate", new, machine=_machine(world))
        console.say(f"written: {path}")
    return runs


def rows(
    runs: list[Run], options: Options, loaded: Any, world: World, command: str, *, graphs: bool
) -> list[results.Row]:
    """Rows of benchmark "generate": one for each run; "tokens" is the batch of a rank. Ours carry the others as peers.

    Latencies ``us`` are those of a decode step; the figures' other names as in ``Figures``.
    """
    from megamoe.adapters.transformers.models import version

    origin = results.provenance(command, commit=options.commit or None)
    origin["versions"]["peers"] = {"transformers": version()}
    out = []
    for name, batch, figures in runs:
        row = asdict(figures) | origin
        row |= {"model": loaded.name, "world_size": world.size, "tokens": batch}
        if name == "megamoe":
            row |= {"engine": _engine(options, loaded, world), "recipe": _recipe(options, loaded), "graphs": graphs}
            others = {n: f.us for n, b, f in runs if b == batch and n != name and f.us is not None}
            row["peers"] = {f"transformers-{version()}:{n}": us for n, us in others.items()}
        else:
            row |= {"engine": name, "recipe": _dtype(loaded)}
        out.append(row)
    return out


def _requests(options: Options, loaded: Any, running: int) -> list[Request]:
    if not options.prompt:
        return workload(
            options.requests or 2 * running,
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


def _warm_up(make: Callable[[list[Request]], Generator], vocabulary: int, batch: int, world: World) -> None:
    """A full batch for a few steps, so that what is made on first use is made."""
    generator = make(workload(batch, prompt_length=16, new_tokens=4, vocabulary=vocabulary, seed=1))
    run(generator, world)
    if isinstance(generator.kv, RowBatch):
        generator.kv.capture(generator.call)


def _copy(request: Request) -> Request:
    return Request(id=request.id, prompt=request.prompt, max_new_tokens=request.max_new_tokens)


def _meet(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    world.gather_text("", "starting together")


def _tell(options: Options, loaded: Any, finished: list[Request], world: World, console: Console) -> None:
    texts = world.gather_text(json.dumps({r.id: r.output for r in finished}), "gathering texts")
    outputs = {int(i): ids for text in texts for i, ids in json.loads(text).items()}
    for i, prompt in enumerate(options.prompt):
        console.text(prompt, loaded.decode(outputs[i]))


def _dtype(loaded: Any) -> str:
    return "fp32" if next(loaded.model.parameters()).dtype == torch.float32 else "bf16"


def _recipe(options: Options, loaded: Any) -> str:
    return _dtype(loaded) if options.recipe == "auto" else options.recipe


def _engine(options: Options, loaded: Any, world: World) -> str:
    """The one that "auto" takes here; all ranks have the same kind of device."""
    problem = Problem(
        hidden=8, intermediate=8, num_experts=world.size, top_k=1, world_size=world.size,
        recipe=cast(Any, _recipe(options, loaded)),
    )  # fmt: skip
    return best(offered(options.engine, problem, world.device, world.group)).name


def _machine(world: World) -> str:
    return "CPU" if world.device.type == "cpu" else results.machine_name()
