"""The mega-kernel's y on virtual ranks of one GPU: routings, forms, sizes, random problems."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from megamoe.testing import routing
from tests.mega.problems import BASE, CHOICES, FORMS, MANY_SLOTS, RECIPES, Given, Layer, Virtual, case_of

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]
PARTS = 10  # of the random problems


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_routings(recipe: str, world_size: int) -> None:
    """One workspace, called again and again; T differs from rank to rank and call to call, 0 included."""
    layer = Layer(replace(BASE, recipe=recipe), world_size)
    with Virtual(layer) as ranks:
        for turn, kind in enumerate(routing.KINDS):
            tokens = BASE.tokens[turn:] + BASE.tokens[:turn]
            ranks.call(layer.all_given(seed=turn, kind=kind, tokens=tokens), kind)
        nowhere = [Given(g.x, torch.full_like(g.topk_idx, -1), g.topk_weights) for g in layer.all_given()]
        ranks.call([*nowhere[:1], *layer.all_given()[1:]], "rank 0 without experts")
        assert all(float(y.abs().sum()) == 0 for y in ranks.call(nowhere, "no rank has experts"))
        ranks.call(layer.all_given(tokens=(0,)), "no tokens")
        ranks.call(layer.all_given(tokens=(1,)), "one token")


@pytest.mark.parametrize("recipe, form", CHOICES)
def test_forms(recipe: str, form: str) -> None:
    case, index = case_of(form, recipe)
    layer = Layer(case, 2, index=index)
    with Virtual(layer) as ranks:
        for turn, kind in enumerate(("balanced", "masked")):
            ranks.call(layer.all_given(seed=turn, kind=kind, tokens=(150, 33)), f"{form}, {kind}")


@pytest.mark.parametrize(
    "recipe, form", [(r, "k4") for r in RECIPES] + [(r, "k5 relu2") for r in RECIPES if r != "fp8_row"]
)
@pytest.mark.parametrize("hidden, intermediate", [(8, 8), (72, 40), (128, 128), (136, 1000), (1032, 264), (2880, 2880)])
def test_sizes(recipe: str, form: str, hidden: int, intermediate: int) -> None:
    case, _ = case_of(form, recipe, hidden=hidden, intermediate=intermediate, tokens=(140, 3), experts=8)
    with Virtual(layer := Layer(case, 2)) as ranks:
        ranks.call(layer.all_given(), f"H {hidden}, I {intermediate}")


@pytest.mark.parametrize("recipe", RECIPES)
def test_many_experts(recipe: str) -> None:
    case = replace(BASE, recipe=recipe, experts=MANY_SLOTS, tokens=(500,), hidden=128, intermediate=64)
    with Virtual(layer := Layer(case, 1)) as ranks:
        ranks.call(layer.all_given())
        ranks.call(layer.all_given(seed=1, kind="zipf"))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("form", ["k4", "k2 relu2 before bias"])
def test_what_is_not_finite_stays_in_its_token(recipe: str, form: str) -> None:
    with Virtual(layer := Layer(case_of(form, recipe)[0], 2)) as ranks:
        given = layer.all_given(tokens=(150, 60))
        want = ranks.call(given)
        x = given[0].x.clone()
        x[7, 3], x[20, 9], x[20, 263] = torch.inf, torch.nan, -torch.inf
        ys = ranks.launch([Given(x, given[0].topk_idx, given[0].topk_weights), given[1]])
        torch.cuda.synchronize()
        assert torch.equal(ys[1], want[1])
        assert not bool(ys[0][[7, 20]].isfinite().all(dim=1).any())
        ys[0][[7, 20]] = want[0][[7, 20]]
        assert torch.equal(ys[0], want[0])


def draw(seed: int) -> tuple[str, int, Layer]:
    """(what, R, layer) of a random problem."""
    r = random.Random(seed)
    recipe, form = r.choice(CHOICES)
    world_size = r.choice([1, 2, 4, 8])
    least = -(-FORMS[form]["top_k"] // world_size)
    case, index = case_of(
        form, recipe, seed=seed, kind=r.choice(list(routing.KINDS)),
        experts=world_size * r.randint(least, max(least, 32 // world_size)),
        hidden=8 * r.randint(4, 80), intermediate=8 * r.randint(4, 60),
        tokens=tuple(r.choice([0, 1, r.randint(2, 30), r.randint(31, 400)]) for _ in range(8)),
    )  # fmt: skip
    return f"seed {seed}, {form}, {case}", world_size, Layer(case, world_size, index=index)


@pytest.mark.parametrize("part", range(PARTS))
def test_random_problems(pytestconfig: pytest.Config, part: int) -> None:
    """``--problems`` in all; in parts, so that several GPUs can share them."""
    wrong = []
    for seed in range(part, pytestconfig.getoption("problems"), PARTS):
        what, _, layer = draw(seed)
        with Virtual(layer) as ranks:
            try:
                ranks.call(layer.all_given(), what)
                ranks.call(layer.all_given(seed=1), what)
            except AssertionError as error:
                wrong.append(str(error))
    assert not wrong, f"{len(wrong)} wrong\n" + "\n".join(wrong[:10])


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_index_out_of_range_contributes_nothing(recipe: str) -> None:
    with Virtual(layer := Layer(replace(BASE, recipe=recipe), 2)) as ranks:
        given = layer.all_given()
        ranks.call(given)
        assert not any(runner.bad_index_seen() for runner in ranks.runners)
        idx = given[0].topk_idx.clone()
        idx[5, 1], idx[9, 0], idx[40] = BASE.experts, -2, 2**40
        ys = ranks.launch([Given(given[0].x, idx, given[0].topk_weights), given[1]])
        dropped = idx.masked_fill((idx < 0) | (idx >= BASE.experts), -1)
        ranks.finish([Given(given[0].x, dropped, given[0].topk_weights), given[1]], ys)
        assert [runner.bad_index_seen() for runner in ranks.runners] == [True, False]
