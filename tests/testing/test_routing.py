"""The shared routings are what their names say."""

from __future__ import annotations

import pytest
import torch

from megamoe.testing.routing import KINDS

TOKENS, EXPERTS, TOP_K = 400, 16, 3


def draw(kind: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return KINDS[kind](TOKENS, EXPERTS, TOP_K, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_ranges_and_repeat(kind: str) -> None:
    idx, weights = draw(kind)
    assert idx.shape == weights.shape == (TOKENS, TOP_K)
    assert idx.dtype == torch.int64
    assert weights.dtype == torch.float32
    assert int(idx.min()) >= -1
    assert int(idx.max()) < EXPERTS
    again_idx, again_weights = draw(kind)
    assert torch.equal(idx, again_idx)
    assert torch.equal(weights, again_weights)
    for row in idx.tolist():
        held = [e for e in row if e >= 0]
        assert len(set(held)) == len(held), "experts of one token are distinct"
    assert bool((weights[idx < 0] == 0).all())
    assert bool((weights[idx >= 0] > 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens(kind: str) -> None:
    idx, weights = KINDS[kind](0, EXPERTS, TOP_K, torch.Generator())
    assert idx.shape == weights.shape == (0, TOP_K)


def test_loads_are_as_named() -> None:
    counts = {kind: torch.bincount(draw(kind)[0].flatten() + 1, minlength=EXPERTS + 1)[1:] for kind in KINDS}
    mean = TOKENS * TOP_K / EXPERTS
    assert float(counts["balanced"].max()) < 1.6 * mean
    assert float(counts["zipf"].max()) > 2.5 * mean
    assert counts["zipf"][0] == counts["zipf"].max()
    assert counts["all_to_one"].tolist() == [TOKENS] * TOP_K + [0] * (EXPERTS - TOP_K)


def test_masked_loses_some_entries_and_some_whole_tokens() -> None:
    idx, _ = draw("masked")
    share = float((idx < 0).float().mean())
    assert 0.3 < share < 0.6
    assert bool((idx < 0).all(dim=1).any())
    assert bool((idx >= 0).all(dim=1).any())
