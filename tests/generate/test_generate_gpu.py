"""Generation on GPUs: the CPU's texts in fp32, and the script's own way in bf16 over NCCL with every implementation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers; see docs/huggingface.md")

from megamoe.adapters import transformers as megamoe_hf
from megamoe.adapters.transformers import choice, lend_experts, models
from megamoe.adapters.transformers.parallel import has_implementations
from megamoe.bench import results
from megamoe.generate import graphs
from megamoe.generate.loop import run
from megamoe.generate.main import generate
from megamoe.generate.options import Options
from megamoe.generate.requests import Request
from megamoe.lm.world import World, from_group
from megamoe.testing.ranks import RankPool
from tests.adapters import hf_case
from tests.generate.test_generate import generated, generator, requests
from tests.lm_case import ALONE


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_one_gpu_says_what_the_cpu_says(family: str) -> None:
    megamoe_hf.register()
    model = hf_case.model(family)
    expected = {r.id: generated(model, r) for r in requests()}
    model.cuda().set_experts_implementation("megamoe")
    work = generator(model, requests(), 3, device=torch.device("cuda"))
    run(work, ALONE)
    assert {r.id: r.output for r in work.scheduler.finished} == expected


def captured_texts(model: Any, mine: list[Request], world: World) -> list[dict[int, list[int]]]:
    """Texts by caches of fixed size on two rows: without graphs, with graphs, and once more."""
    choice.choose(model, "megamoe", world, megamoe_hf.Settings())
    settings = megamoe_hf.Settings(engine="mega", max_tokens=64)
    captured, note = graphs.prepare(Options(graphs="on"), model, world, settings, width=40)
    assert captured is not None, note
    captured.direct.install()
    kv = captured.rows(2)
    texts = []
    for turn in range(3):
        fresh = [Request(id=r.id, prompt=r.prompt, max_new_tokens=r.max_new_tokens) for r in mine]
        work = generator(
            model, fresh, 2, device=world.device, idle=lambda: lend_experts(model), kv=kv, check=captured.direct.check
        )
        run(work, world)
        texts.append({r.id: r.output for r in work.scheduler.finished})
        if turn == 0:
            kv.capture(work.call)
    captured.direct.close()
    return texts


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_graphs_give_the_same_tokens(family: str) -> None:
    megamoe_hf.register()
    model = hf_case.model(family).to("cuda", torch.bfloat16)
    world = World(0, 1, None, torch.device("cuda", 0), "")
    texts = captured_texts(model, requests(), world)
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) == 7
    assert len({tuple(t) for t in texts[0].values()}) > 1


def _graphs(rank: int, world_size: int, group: Any, shares: list[list[int]]) -> Any:
    megamoe_hf.register()
    world = from_group(device="cuda")
    model = hf_case.model("qwen3_moe").to("cuda", torch.bfloat16)
    models._keep_parts(model, world)
    return captured_texts(model, [r for r in requests() if r.id in shares[rank]], world)


def _texts(rank: int, world_size: int, group: Any, folder: Path, shares: list[list[int]]) -> Any:
    hf_case.as_torchrun_would(rank, world_size)
    megamoe_hf.register()
    world = from_group(device="cuda")
    loaded = models.load(str(folder), world, layers=None, tiny=False, dtype=torch.float32, seed=0)
    texts = {}
    for name in choice.IMPLEMENTATIONS if has_implementations() else ["megamoe"]:
        choice.choose(loaded.model, name, world, megamoe_hf.Settings())
        work = generator(
            loaded.model, [r for r in requests() if r.id in shares[rank]], 2,
            device=world.device, idle=lambda: lend_experts(loaded.model),
        )  # fmt: skip
        run(work, world)
        texts[name] = {r.id: r.output for r in work.scheduler.finished}
    return texts


def _script(rank: int, world_size: int, group: Any, results: str, engine: str) -> Any:
    hf_case.as_torchrun_would(rank, world_size)
    experts = choice.IMPLEMENTATIONS if has_implementations() else ("megamoe",)
    options = Options(
        tiny=True, experts=experts, engine=engine, batch=(1, 4), new_tokens=6, results=results, commit="test"
    )
    return generate(options, from_group(device="cuda"), command="a test")


@pytest.mark.multi_gpu
@pytest.mark.parametrize("shares", [[[0, 2, 3, 5], [1, 4, 6]], [[0], [1, 2, 3, 4, 5, 6]]], ids=["even", "uneven"])
def test_graphs_on_two_gpus(shares: list[list[int]]) -> None:
    """The other rank reads prompts, decodes without a graph or lends its experts while one replays its own."""
    with RankPool(2, backend="cpu:gloo,cuda:nccl") as pool:
        for rank, texts in enumerate(pool.run(_graphs, shares)):
            assert texts[0] == texts[1] == texts[2]
            assert sorted(texts[0]) == shares[rank] and all(texts[0].values())


@pytest.mark.multi_gpu
def test_two_gpus(tmp_path: Path) -> None:
    """fp32 from a directory: texts as on the CPU, also beside an idle rank; then the script in bf16 as it comes."""
    model = hf_case.model("qwen3_moe")
    model.save_pretrained(tmp_path / "saved")
    expected = {r.id: generated(model, r) for r in requests()}
    with RankPool(2, backend="cpu:gloo,cuda:nccl") as pool:
        for shares in ([[0, 2, 3, 5], [1, 4, 6]], [[], [0, 1, 2, 3, 4, 5, 6]]):
            for rank, texts in enumerate(pool.run(_texts, tmp_path / "saved", shares)):
                for name, outputs in texts.items():
                    assert outputs == {i: expected[i] for i in shares[rank]}, name
        for engine in ("staged", "mega"):
            runs = pool.run(_script, str(tmp_path / engine), engine)
            for (name, batch, figures), other in zip(*runs, strict=True):
                assert (name, batch, figures) == other
                assert figures.requests == 4 * batch and figures.us is not None
                assert figures.new_tokens >= 3 * figures.requests
            (file,) = (tmp_path / engine).glob("generate-*.json")
            assert {(row["engine"], row.get("graphs")) for row in results.load(file)} >= {(engine, engine == "mega")}
