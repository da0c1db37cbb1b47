"""Caches of fixed size: the same tokens as from caches that grow, whoever joins and leaves; who may have them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers; .ci/client_transformers runs these tests")

from megamoe.adapters import transformers as megamoe_hf
from megamoe.adapters.transformers.direct import DirectExperts
from megamoe.adapters.transformers.experts import Settings
from megamoe.adapters.transformers.row_cache import make_row_cache, row_mask
from megamoe.functional import mega_moe
from megamoe.generate import graphs
from megamoe.generate.loop import run
from megamoe.generate.main import generate, main
from megamoe.generate.options import Options
from megamoe.generate.rows import RowBatch, sizes_for
from megamoe.weights import ExpertWeights
from tests.adapters import hf_case
from tests.generate.test_generate import generated, generator, requests
from tests.lm_case import ALONE

WIDTH = 48


@contextlib.contextmanager
def counted(count: torch.Tensor) -> Iterator[None]:
    yield


def rows_for(model: Any, max_rows: int) -> RowBatch:
    config = model.config.get_text_config()
    return RowBatch(
        max_rows=max_rows,
        device=torch.device("cpu"),
        make_cache=lambda columns: make_row_cache(config.num_hidden_layers, columns, WIDTH),
        make_mask=lambda columns: row_mask(config, columns, WIDTH, model.dtype),
        counting=counted,
    )


def test_sizes() -> None:
    assert [sizes_for(n) for n in (1, 2, 3, 4, 6)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4], [1, 2, 4, 6]]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "mixtral"])
def test_tokens_are_transformers_own(family: str) -> None:
    """Seven requests through one, three and four rows; a batch of rows serves a second time, as with its graphs."""
    megamoe_hf.register()
    model = hf_case.model(family)
    expected = {r.id: generated(model, r) for r in requests()}
    model.set_experts_implementation("megamoe")
    for max_rows in (1, 3, 4):
        kv = rows_for(model, max_rows)
        for _ in range(2):
            work = generator(model, requests(), max_rows, kv=kv)
            run(work, ALONE)
            assert {r.id: r.output for r in work.scheduler.finished} == expected
            assert len(kv) == 0


def test_rows_keep_their_order_when_slots_move() -> None:
    """Row r of 5 writes r everywhere; rows 0 and 2 leave, two others join: each still reads its own numbers."""
    columns: list[torch.Tensor] = []

    def make_cache(given: torch.Tensor) -> Any:
        columns.append(given)
        return make_row_cache(1, given, 8)

    kv = RowBatch(
        max_rows=5, device=torch.device("cpu"), make_cache=make_cache, make_mask=lambda c: c, counting=counted
    )

    def prompts(values: list[int], lengths: list[int]) -> tuple[Any, torch.Tensor, list[int]]:
        longest = max(lengths)
        cache = make_row_cache(1, torch.zeros(len(values), dtype=torch.int64), longest)
        numbers = torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 2, longest, 3).clone()
        for row, length in enumerate(lengths):
            numbers[row, :, : longest - length] = torch.nan  # padding before the prompt
        cache.layers[0].keys, cache.layers[0].values = numbers, -numbers
        return cache, torch.ones(len(values), longest), lengths

    def call(ids: torch.Tensor, mask: Any, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        new = ids.float().view(-1, 1, 1, 1).expand(-1, 2, 1, 3)
        keys, values = cache.update(new, -new, 0)
        assert torch.equal(keys.nan_to_num(), -values.nan_to_num())
        last = positions.view(-1, 1, 1, 1).expand(-1, 2, 1, 3)
        written = keys.gather(2, last)[:, 0, 0, 0]
        return torch.stack([keys[:, 0, 0, 0], written, positions[:, 0].float()], 1)

    kv.join(*prompts([10, 11, 12, 13, 14], [1, 2, 3, 1, 2]))
    assert kv.decode(call, [20, 21, 22, 23, 24]).tolist() == [
        [10, 20, 1], [11, 21, 2], [12, 22, 3], [13, 23, 1], [14, 24, 2]
    ]  # fmt: skip
    kv.keep([1, 3, 4])
    assert kv.decode(call, [31, 33, 34]).tolist() == [[11, 31, 3], [13, 33, 2], [14, 34, 3]]
    kv.join(*prompts([15, 16], [4, 1]))
    assert kv.decode(call, [41, 43, 44, 45, 46]).tolist() == [
        [11, 41, 4], [13, 43, 3], [14, 44, 4], [15, 45, 4], [16, 46, 1]
    ]  # fmt: skip
    kv.keep([4])
    assert kv.decode(call, [56]).tolist() == [[16, 56, 2]]
    kv.keep([])
    assert len(kv) == 0 and not columns[0].any()


class Runner:
    """Stands for ``MegaRunner``: the same call through the engine ``reference``."""

    made: ClassVar[list[Any]] = []

    def __init__(self, problem: Any) -> None:
        self.problem = problem

    @classmethod
    def create(cls, problem: Any, **_: Any) -> Runner:
        cls.made.append(problem)
        return cls(problem)

    def forward(self, x: Any, index: Any, weights: Any, prepared: Any, *, out: Any, num_tokens: Any) -> torch.Tensor:
        biases = [None if b is None else b.bfloat16() for b in (prepared.b13, prepared.b2)]
        experts = ExpertWeights(prepared.w13, prepared.w2, *biases)
        y = mega_moe(x, index, weights, experts, problem=self.problem, group="self", engine="reference")
        if num_tokens is None:
            assert out is None
            return y
        assert not out.any()
        out[: int(num_tokens)] = y[: int(num_tokens)]
        return out  # type: ignore[no-any-return]

    def check(self) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_without_a_handshake(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megamoe.mega.runner.MegaRunner", Runner)
    Runner.made = []
    megamoe_hf.register(recipe="bf16")
    model = hf_case.model(family).bfloat16().eval()
    ids = hf_case.tokens(2, 5)
    model.set_experts_implementation("megamoe")
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        direct = DirectExperts(model, None, torch.device("cpu"), Settings(max_tokens=16))
        direct.install()
        assert torch.equal(model(input_ids=ids).logits, expected)
        assert len(Runner.made) == 1 and Runner.made[0].max_tokens == 16 and Runner.made[0].recipe == "bf16"
        with direct.counting(torch.tensor([5], dtype=torch.int32)):
            some = model(input_ids=ids).logits
    assert torch.equal(some[0], expected[0]) and not torch.equal(some[1], expected[1])
    assert some.isfinite().all()


def test_graphs_are_refused_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    reason = "the mega-kernel runs on GPUs of compute capability 9.0, not on cpu"
    model = hf_case.model("qwen3_moe")
    assert graphs.prepare(Options(), model, ALONE, Settings(), width=20) == (
        None, f"Decode steps are not captured: {reason}."
    )  # fmt: skip
    arguments = ["--tiny", "--device", "cpu", "--graphs", "on", "--batch", "1", "--new-tokens", "2"]
    assert main(arguments, launched=False) == 2
    assert f"--graphs on can't be: {reason}" in capsys.readouterr().err
    runs = generate(Options(tiny=True, device="cpu", new_tokens=2, batch=(1,), graphs="off"), ALONE, command="")
    assert len(runs) == 1
