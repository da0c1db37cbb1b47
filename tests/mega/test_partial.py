"""Partial sums on the way back, on virtual ranks of one GPU: the bits of y are those of the kernel without them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from megamoe.errors import PeerTimeout
from megamoe.testing import routing
from megamoe.testing.mega_activations import Pool
from tests.mega.problems import BASE, PARTIAL_FORMS, RECIPES, Given, Layer, Virtual, case_of
from tests.mega.test_shared import FORMS as SHARED
from tests.mega.test_shared import layer_of

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]


@contextmanager
def both(layer: Layer) -> Iterator[tuple[Virtual, Virtual]]:
    """(ranks without partial sums, ranks with them)."""
    with Virtual(layer, partial_sums=False) as plain, Virtual(layer, partial_sums=True) as partial:
        assert not plain.runners[0].workspace.config.partial_sums and partial.runners[0].workspace.config.partial_sums
        yield plain, partial


def compare(plain: Virtual, partial: Virtual, given: list[Given], what: str = "", **options: Any) -> list[torch.Tensor]:
    """A call of either; raises AssertionError where their bits differ, saying where. Returns y of each rank."""
    want = plain.launch(given, **options)
    torch.cuda.synchronize()
    got = partial.launch(given, **options)
    torch.cuda.synchronize()
    for rank, (a, b) in enumerate(zip(want, got, strict=True)):
        plain.runners[rank].check()
        partial.runners[rank].check()
        wrong = (a.view(torch.int16) != b.view(torch.int16)).nonzero()
        assert len(wrong) == 0, (
            f"{what}: rank {rank} of {len(want)}, {len(wrong)} of {a.numel()} elements differ, in "
            f"{len(wrong[:, 0].unique())} tokens; the first at {wrong[0].tolist()}: "
            f"{float(b[tuple(wrong[0])])} with partial sums, {float(a[tuple(wrong[0])])} without"
        )
    return got


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_routings(recipe: str, world_size: int) -> None:
    """Balanced, skewed, masked and others; T differs from rank to rank and call to call, 0 included."""
    layer = Layer(replace(BASE, recipe=recipe), world_size)
    with both(layer) as (plain, partial):
        for turn, kind in enumerate(routing.KINDS):
            tokens = BASE.tokens[turn:] + BASE.tokens[:turn]
            given = layer.all_given(seed=turn, kind=kind, tokens=tokens)
            ys = compare(plain, partial, given, kind)
            partial.finish(given, ys, kind)
        all_given = layer.all_given(seed=9)
        one = [Given(g.x, torch.full_like(g.topk_idx, -1), g.topk_weights) for g in all_given]
        for g in one:
            g.topk_idx[:, 0] = layer.case.experts - 1
        compare(plain, partial, one, "all to one expert")
        nowhere = [Given(g.x, torch.full_like(g.topk_idx, -1), g.topk_weights) for g in all_given]
        compare(plain, partial, [*nowhere[:1], *all_given[1:]], "rank 0 without experts")
        assert all(float(y.abs().sum()) == 0 for y in compare(plain, partial, nowhere, "no rank has experts"))
        compare(plain, partial, layer.all_given(tokens=(0,)), "no tokens")
        compare(plain, partial, layer.all_given(tokens=(1,)), "one token")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("world_size", [2, 4])
def test_many_tokens_beside_few(recipe: str, world_size: int) -> None:
    """Over 1536 routes a rank's CTAs sort together, up to there one for each owner: both at once, and either alone."""
    layer = Layer(replace(BASE, recipe=recipe, hidden=520, tokens=(900, 300, 385, 384)), world_size)
    with both(layer) as (plain, partial):
        for turn, tokens in enumerate([(900, 300, 385, 384), (700,), (384,), (0, 900), (900, 1)]):
            for kind in ("balanced", "zipf", "masked"):
                given = layer.all_given(seed=turn, kind=kind, tokens=tokens)
                compare(plain, partial, given, f"{kind}, {tokens}")


@pytest.mark.parametrize("recipe, form", PARTIAL_FORMS)
@pytest.mark.parametrize("world_size", [2, 8])
def test_forms(recipe: str, form: str, world_size: int) -> None:
    """1 to 16 experts a token, weights before and after, biases, both accumulations."""
    case, index = case_of(form, recipe)
    layer = Layer(case, world_size, index=index)
    with both(layer) as (plain, partial):
        for turn, kind in enumerate(("balanced", "masked", "zipf")):
            given = layer.all_given(seed=turn, kind=kind, tokens=(150, 33, 0, 129))
            compare(plain, partial, given, f"{form}, {kind}")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("hidden", [8, 72, 136, 256, 1032, 2880, 7168])
def test_sizes(recipe: str, hidden: int) -> None:
    """Rows of less than the 256 columns that a warp takes, and of more than a buffer holds."""
    case = replace(BASE, recipe=recipe, hidden=hidden, intermediate=136, tokens=(140, 3), experts=8)
    with both(layer := Layer(case, 2)) as (plain, partial):
        compare(plain, partial, layer.all_given(), f"H {hidden}")


@pytest.mark.parametrize("form", SHARED)
@pytest.mark.parametrize("world_size", [2, 4])
def test_shared_experts(form: tuple[str, int, dict], world_size: int) -> None:
    """They are the last of a token's experts on its own rank."""
    with both(layer := layer_of(form, world_size)) as (plain, partial):
        for turn, kind in enumerate(("balanced", "masked")):
            given = layer.all_given(seed=turn, kind=kind)
            ys = compare(plain, partial, given, kind)
            partial.finish(given, ys, kind)


def test_one_row_a_token_and_owner_crosses() -> None:
    """Slots of results that are not the first of their token's at an owner stay as they were."""
    world_size = 2
    layer = Layer(replace(BASE, tokens=(150, 60)), world_size)
    with Virtual(layer, partial_sums=True) as ranks:
        given = layer.all_given()
        for runner in ranks.runners:
            runner.buffer["results"].fill_(-7.0)
        ranks.call(given)
        for runner, g in zip(ranks.runners, given, strict=True):
            rank = runner.buffer.rank
            owner = runner.workspace.physical(g.topk_idx, rank).div(layer.slots, rounding_mode="floor")
            earlier = (owner[:, :, None] == owner[:, None, :]).tril(-1).any(2)
            results = runner.buffer["results"][: len(owner)]
            untouched = (results == -7.0).all(2)
            assert torch.equal(untouched, earlier | (owner < 0))
        for r in range(world_size):
            views = ranks.runners[0].buffer.peer(r)
            rows = Pool.of(views, ranks.runners[r].workspace).row
            assert len(rows) and bool(views["returns"][rows].isfinite().all())


def test_many_calls_in_a_row_and_the_device_s_number_of_tokens() -> None:
    layer = Layer(replace(BASE, tokens=(150,)), 4)
    with both(layer) as (plain, partial):
        given = layer.all_given()
        want = compare(plain, partial, given)
        for _ in range(50):
            ys = partial.launch(given)
        torch.cuda.synchronize()
        for y, w in zip(ys, want, strict=True):
            assert torch.equal(y, w)
        counts = [torch.tensor([n], dtype=torch.int32, device="cuda") for n in (0, 150, 7, 61)]
        ys = partial.launch(given, num_tokens=counts)
        torch.cuda.synchronize()
        for n, y, w in zip((0, 150, 7, 61), ys, want, strict=True):
            assert torch.equal(y[:n], w[:n]) and bool(y[n:].isnan().all())


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("tokens", [50, 500])
def test_a_missing_rank_is_named_and_reset_helps(
    recipe: str, world_size: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = Layer(replace(BASE, recipe=recipe, tokens=(tokens,)), world_size)
    missing = world_size - 1
    with both(layer) as (plain, partial):
        given = layer.all_given()
        want = compare(plain, partial, given)
        monkeypatch.setenv("MEGAMOE_TIMEOUT_S", "1")
        begin = time.monotonic()
        ys = partial.launch(given, ranks=list(range(missing)))
        torch.cuda.synchronize()
        assert time.monotonic() - begin < 10
        texts = []
        for runner, y in zip(partial.runners[:missing], ys, strict=False):
            assert bool(y.isnan().all())
            with pytest.raises(PeerTimeout) as error:
                runner.check()
            texts.append(str(error.value))
        assert any(f"rank {missing} to start its call" in text for text in texts), texts
        for runner in partial.runners:
            runner.reset()
        monkeypatch.setenv("MEGAMOE_TIMEOUT_S", "30")
        for _ in range(3):
            ys = partial.call(given)
        assert all(torch.equal(y, w) for y, w in zip(ys, want, strict=True))
