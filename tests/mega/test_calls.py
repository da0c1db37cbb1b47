"""How the mega-kernel may be called: again, into strided memory, with T on the device, in graphs, on other streams."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megamoe.mega.runner import MegaRunner
from tests.mega.problems import BASE, RECIPES, Given, Layer, Virtual

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]


@pytest.fixture(params=RECIPES)
def layer(request: pytest.FixtureRequest) -> Layer:
    return Layer(replace(BASE, recipe=request.param, tokens=(200, 71)), 2)


def test_repeats_bit_for_bit(layer: Layer) -> None:
    with Virtual(layer) as ranks:
        given, other = layer.all_given(kind="zipf"), layer.all_given(seed=1, tokens=(90, 200))
        first = ranks.call(given)
        for _ in range(5):
            ranks.call(other)
            for y, again in zip(first, ranks.call(given), strict=True):
                assert torch.equal(y, again)


@pytest.mark.parametrize("accumulate", ["fp32", "fast"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_rows_change_places_and_bits_do_not(recipe: str, accumulate: str) -> None:
    """Many tokens are sorted in another order each time: an expert's last block, of few rows, holds others of them."""
    if (recipe, accumulate) == ("bf16", "fast"):
        pytest.skip("bf16 has one way to accumulate")
    case = replace(BASE, recipe=recipe, accumulate=accumulate, hidden=1032, intermediate=520, tokens=(600, 580))
    layer = Layer(case, 2)
    with Virtual(layer) as ranks:
        given = layer.all_given()
        rows = torch.cat([g.topk_idx.flatten() for g in given]).bincount(minlength=case.experts)
        assert ((rows > 128) & (rows % 128 > 0) & (rows % 128 <= 64)).any()
        first = ranks.call(given)
        for _ in range(20):
            for y, again in zip(first, ranks.call(given), strict=True):
                assert torch.equal(y, again)


def test_layers_share_a_workspace(layer: Layer) -> None:
    """Other weights and other data, turn about, without waiting in between."""
    others = [Layer(replace(layer.case, seed=seed), 2) for seed in (1, 2)]
    with Virtual(layer) as ranks:
        queued = []
        for turn in range(9):
            ranks.layer = [layer, *others][turn % 3]
            queued.append((ranks.layer, ranks.layer.all_given(seed=turn)))
        outs: list[list[torch.Tensor]] = []
        for at, given in queued:
            ranks.layer = at
            outs.append(ranks.launch(given))
        torch.cuda.synchronize()
        for (at, given), ys in zip(queued, outs, strict=True):
            ranks.layer = at
            for y, again in zip(ys, ranks.call(given), strict=True):
                assert torch.equal(y, again)


def test_out_and_x_may_be_strided_and_nothing_else_is_written(layer: Layer) -> None:
    with Virtual(layer) as ranks:
        given = layer.all_given()
        wide = [torch.full((len(g.x) + 4, 3 * g.x.shape[1] + 8), 7.0, device="cuda", dtype=g.x.dtype) for g in given]
        H = layer.problem.hidden
        outs = [w[: len(g.x), H : 2 * H] for w, g in zip(wide, given, strict=True)]
        strided = []
        for g in given:
            x = torch.zeros(len(g.x), H + 24, device="cuda", dtype=g.x.dtype)
            x[:, 8 : 8 + H] = g.x
            strided.append(Given(x[:, 8 : 8 + H], g.topk_idx, g.topk_weights))
        want = ranks.call(given)
        ranks.call(strided, outs=outs)
        for w, g, y in zip(wide, given, want, strict=True):
            assert torch.equal(w[: len(g.x), H : 2 * H], y)
            w[: len(g.x), H : 2 * H] = 7
            assert bool((w == 7).all())


def test_tokens_counted_on_the_device(layer: Layer) -> None:
    with Virtual(layer) as ranks:
        given = layer.all_given()
        for counts in ((200, 71), (130, 0), (0, 0), (1, 71)):
            outs = [torch.full_like(g.x, 7.0) for g in given]
            on_device = [torch.tensor([n], dtype=torch.int32, device="cuda") for n in counts]
            ranks.launch(given, outs=outs, num_tokens=on_device)
            short = [g.first(n) for g, n in zip(given, counts, strict=True)]
            ranks.finish(short, [y[:n] for y, n in zip(outs, counts, strict=True)], str(counts))
            assert all(bool((y[n:] == 7).all()) for y, n in zip(outs, counts, strict=True))


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("recipe", RECIPES)
def test_graphs_replay_with_other_tokens_and_routing(recipe: str, world_size: int) -> None:
    """A graph a rank; what changes between replays lies in the memory that was captured."""
    layer = Layer(replace(BASE, recipe=recipe, tokens=(200, 71)), world_size)
    with Virtual(layer) as ranks:
        held = layer.all_given(tokens=(200,))
        counts = torch.full((world_size,), 200, dtype=torch.int32, device="cuda")
        outs = [torch.zeros_like(g.x) for g in held]
        ranks.call(held)  # loads the kernel
        graphs = []
        for rank, stream in enumerate(ranks.streams):
            g, graph = held[rank], torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                ranks.runners[rank].forward(
                    g.x, g.topk_idx, g.topk_weights, layer.weights[rank],
                    out=outs[rank], num_tokens=counts[rank : rank + 1],
                )  # fmt: skip
            graphs.append(graph)
        for turn, (kind, tokens) in enumerate([("balanced", (200, 71)), ("zipf", (1, 200)), ("all_to_one", (0, 128))]):
            fresh = layer.all_given(seed=turn, kind=kind, tokens=tokens)
            for rank, g in enumerate(fresh):
                n = len(g.x)
                counts[rank] = n
                held[rank].x[:n], held[rank].topk_idx[:n], held[rank].topk_weights[:n] = g.x, g.topk_idx, g.topk_weights
                outs[rank].fill_(7.0)
            for _ in range(2):  # a replay behind a replay
                torch.cuda.synchronize()
                for graph, stream in zip(graphs, ranks.streams, strict=True):
                    with torch.cuda.stream(stream):
                        graph.replay()
            ranks.finish(fresh, [y[: len(g.x)] for y, g in zip(outs, fresh, strict=True)], f"replay {turn}")
            assert all(bool((y[len(g.x) :] == 7).all()) for y, g in zip(outs, fresh, strict=True))
        ranks.call(layer.all_given(seed=9))  # and without a graph again


def test_follows_its_stream(layer: Layer) -> None:
    """Inputs that a slow stream is still writing are read after it, and y is there for what follows."""
    with Virtual(Layer(layer.case, 1)) as ranks:
        given = ranks.layer.all_given()
        (want,) = ranks.call(given)
        g, stream = given[0], ranks.streams[0]
        x, runner = torch.zeros_like(g.x), ranks.runners[0]
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            x.copy_(g.x)
            y = runner.forward(x, g.topk_idx, g.topk_weights, ranks.layer.weights[0])
            doubled = y * 2
        stream.synchronize()
        runner.check()
        assert torch.equal(doubled, want * 2)


def test_few_multiprocessors(layer: Layer) -> None:
    one = Layer(layer.case, 1)
    given = one.given(0)
    (runner,) = MegaRunner.virtual(one.problem, device="cuda", slots=one.slots, num_sms=3)
    y = runner.forward(given.x, given.topk_idx, given.topk_weights, one.weights[0])
    torch.cuda.synchronize()
    runner.check()
    one.check(runner, given, y)
    runner.close()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "x dtype": ({"x": torch.float32}, "x must be bf16"),
    "idx dtype": ({"topk_idx": torch.int16}, "int64 or int32"),
    "weights dtype": ({"topk_weights": torch.float64}, "fp32"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_and_the_next_call_is_right(name: str) -> None:
    changes, text = BAD[name]
    with Virtual(layer := Layer(replace(BASE, tokens=(40,), recipe="bf16"), 1)) as ranks:
        g = layer.given(0)
        parts = {"x": g.x, "topk_idx": g.topk_idx, "topk_weights": g.topk_weights}
        bad = {name: t.to(changes[name]) if name in changes else t for name, t in parts.items()}
        with pytest.raises(ValueError, match=text):
            ranks.runners[0].forward(**bad, weights=layer.weights[0])
        too_many = torch.zeros(layer.problem.max_tokens + 1, layer.problem.hidden, device="cuda", dtype=torch.bfloat16)
        idx = torch.zeros(len(too_many), 4, device="cuda", dtype=torch.int64)
        with pytest.raises(ValueError, match="max_tokens"):
            ranks.runners[0].forward(too_many, idx, idx.float(), layer.weights[0])
        ranks.call([g])
