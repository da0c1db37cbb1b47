"""Stock layer against ours on two GPUs in bf16, at the sizes of a small real layer."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from megamoe.testing.ranks import RankPool

pytest.importorskip("megatron.core", reason="needs megatron-core 0.16 or 0.19 (and triton)", exc_type=ImportError)

from megamoe.adapters.megatron.options import Options
from megamoe.adapters.megatron.train import Figures, run
from megamoe.lm.data import load_corpus
from megamoe.lm.world import from_group

pytestmark = [pytest.mark.multi_gpu, pytest.mark.filterwarnings("ignore")]

# Experts of Qwen3-30B-A3B's width in a narrower, shallower model: 32 of them instead of 128 keep start-up short.
SIZES = Options(
    device="cuda",
    precision="bf16",
    layers=4,
    hidden=2048,
    heads=16,
    experts=32,
    top_k=8,
    intermediate=768,
    length=1024,
    batch=8,
    micro_batch=4,
    steps=20,
    warmup=5,
    lr=1e-4,
)


def train(rank: int, world_size: int, group: Any, options: Options) -> Figures:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run(options, from_group(device="cuda"), load_corpus(None, length=options.length))


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """Two ranks for all tests: importing Megatron-Core takes longer than most of them."""
    with pytest.MonkeyPatch.context() as patch:
        # One rank may compile Megatron-Core's small functions for longer than the other.
        patch.setenv("MEGAMOE_TIMEOUT_S", "120")
        with RankPool(2, backend="cpu:gloo,cuda:nccl", timeout_s=280) as ranks:
            yield ranks


@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed-optimizer"])
def test_bf16_follows_the_stock_layer(pool: RankPool, distributed: bool, record_property: Any) -> None:
    options = dataclasses.replace(SIZES, distributed_optimizer=distributed)
    want = pool.run(train, dataclasses.replace(options, moe="stock"))[0]
    got = pool.run(train, options)[0]
    record_property("stock_tokens_per_second", round(want.tokens_per_second))
    record_property("tokens_per_second", round(got.tokens_per_second))
    differences = [abs(a - b) / a for a, b in zip(want.losses, got.losses, strict=True)]
    record_property("diff", max(differences))
    assert want.losses[-1] < want.losses[0] - 0.2
    # The same weights and bytes; bf16 has 8 bits of mantissa, and both round at other places.
    assert differences[0] < 2e-3
    assert max(differences) < 1e-2
    assert got.grad_norms[0] == pytest.approx(want.grad_norms[0], rel=2e-2)


def test_bf16_with_the_mega_kernel_follows_staged(pool: RankPool) -> None:
    """Forward in the kernel, backward as staged does it, which computes the first product again."""
    options = dataclasses.replace(SIZES, layers=2, steps=5, warmup=0)
    want = pool.run(train, dataclasses.replace(options, engine="staged"))[0]
    got = pool.run(train, dataclasses.replace(options, engine="mega"))[0]
    assert got.losses == pytest.approx(want.losses, rel=2e-3)
    assert got.grad_norms == pytest.approx(want.grad_norms, rel=2e-2)


def test_fp32_follows_the_stock_layer(pool: RankPool) -> None:
    options = dataclasses.replace(
        SIZES,
        precision="fp32",
        hidden=256,
        intermediate=256,
        layers=2,
        length=128,
        experts=8,
        top_k=2,
        warmup=0,
        steps=6,
    )
    want = pool.run(train, dataclasses.replace(options, moe="stock"))[0]
    got = pool.run(train, options)[0]
    assert got.losses == pytest.approx(want.losses, rel=1e-4)
    assert got.grad_norms == pytest.approx(want.grad_norms, rel=1e-3)
