"""What the mega-kernel's host side says and computes without a GPU."""

from __future__ import annotations

import ctypes
import re
from dataclasses import replace

import pytest
import torch

from megamoe.activation import Activation
from megamoe.errors import MegaMoEError, PeerTimeout
from megamoe.kernels.jit.source import INCLUDE_ROOT
from megamoe.mega.config import SMEM_LIMIT
from megamoe.mega.record import Records
from megamoe.mega.runner import config_for, why_not
from megamoe.mega.workspace import _BAND_BLOCKS, Workspace
from megamoe.problem import Problem
from megamoe.testing.cases import CASES
from tests.mega.problems import CHOICES, RECIPES, case_of, sources

PROBLEM = Problem(hidden=128, intermediate=64, num_experts=8, top_k=2, world_size=2)


@pytest.mark.parametrize(
    "change, slots, text",
    [
        ({"recipe": "fp32"}, 4, "recipes bf16, fp8_block, fp8_row"),
        ({"recipe": "mxfp4"}, 4, "not mxfp4"),
        ({"world_size": 128, "num_experts": 128}, 1, "up to 64 ranks"),
        ({"max_tokens": 1 << 30}, 4, "max_tokens"),
        ({}, 1025, "1024 experts"),
    ],
)
def test_refusals_are_sentences(change: dict, slots: int, text: str) -> None:
    reason = why_not(replace(PROBLEM, **change), slots)
    assert reason is not None and text in reason
    assert why_not(PROBLEM, 4) is None


@pytest.mark.parametrize("max_tokens", [1, 40, 8192])
def test_ring_holds_a_band_or_all_blocks(max_tokens: int) -> None:
    """Else a copy could wait for a tile that stands behind its own (docs/protocol.md)."""
    text = (INCLUDE_ROOT / "megamoe/mega/context.cuh").read_text(encoding="utf-8")
    (band,) = re.findall(r"constexpr u32 kBand = (\d+);", text)
    problem = replace(PROBLEM, max_tokens=max_tokens)
    workspace = Workspace(problem=problem, config=config_for(problem, 4, index_64=True), slots=4)
    assert workspace.ring_blocks >= min(int(band), workspace.max_blocks)
    assert int(band) == _BAND_BLOCKS


def test_kernels_of_the_tests_are_few_and_fit() -> None:
    assert len(CHOICES) + len(RECIPES) <= len(sources()) <= 74
    for recipe, form in CHOICES:
        problem = case_of(form, recipe)[0].problem(1)
        config = config_for(problem, 32, index_64=True)
        assert config.smem_bytes <= SMEM_LIMIT and config.num_stages >= 3
        assert config.top_k == problem.top_k and config.bias == problem.bias


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_workspace_holds_the_worst_skew(name: str, recipe: str) -> None:
    problem = CASES[name].problem(world_size=2, max_tokens=512, recipe=recipe)
    slots = problem.num_experts // 2
    workspace = Workspace(problem=problem, config=config_for(problem, slots, index_64=True), slots=slots)
    # Every token of every rank to the same K experts of one rank, and rows of all other experts padded.
    assert workspace.max_blocks * 128 >= 2 * 512 * problem.top_k
    assert workspace.row_pitch % 128 == 0 and workspace.row_pitch >= problem.hidden * (1 if recipe != "bf16" else 2)
    assert "mid" in workspace.explain() and "routes" in workspace.explain()


def test_a_record_becomes_a_sentence() -> None:
    records = Records(torch.device("cpu"))
    assert records.error() is None
    words = (ctypes.c_uint32 * 8).from_address(records.record)
    words[:] = [2, 0, 3, 17, 0, 5, 4, 9]
    error = records.error()
    assert isinstance(error, PeerTimeout)
    assert "rank 0 waited longer than" in str(error) and "rank 3 to start its call" in str(error)
    assert "awaited 5 and saw 4 in call 9" in str(error)
    records.clear()
    assert records.error() is None
    (ctypes.c_uint32 * 4).from_address(records.ring_record)[:] = [1, 2, 3, 0]
    assert isinstance(records.error(), MegaMoEError) and "block 2" in str(records.error())


@pytest.mark.parametrize("name, most_mib", [("flash8", 800), ("dsv3-8", 1536)])
def test_workspace_of_8192_tokens_stays_within_its_bound(name: str, most_mib: int) -> None:
    problem = CASES[name].problem(world_size=2, max_tokens=8192, recipe="fp8_block")
    slots = problem.num_experts // 2
    workspace = Workspace(problem=problem, config=config_for(problem, slots, index_64=True), slots=slots)
    assert workspace.arena.num_bytes <= most_mib << 20


def test_a_tile_of_a_matrix_that_is_not_gated_is_twice_as_wide() -> None:
    """256 rows of w13 either way; scales of activations stay one per 128 columns."""
    for inter, gated, plain, blocks in ((8, 1, 1, 1), (128, 1, 1, 1), (264, 3, 2, 3), (2880, 23, 12, 23)):
        for activation, tiles in (("swiglu", gated), ("relu2", plain)):
            problem = replace(PROBLEM, intermediate=inter, activation=Activation(activation), recipe="fp8_block")
            workspace = Workspace(problem=problem, config=config_for(problem, 4, index_64=True), slots=4)
            assert workspace.up_tiles == tiles
            assert workspace.arena.fields["mid_scales"].shape[0] == workspace.mid_blocks == blocks


def test_a_kernel_is_written_down_once() -> None:
    """Each call asks for it: a hash of the configuration, not a text of ten thousand characters."""
    config = config_for(PROBLEM, 4, index_64=True)
    assert replace(config).source() is config.source()
    assert replace(config, index_64=False).source() != config.source()
