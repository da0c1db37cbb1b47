"""Generation end to end: transformers' own greedy tokens whatever shares the batch, on one rank and on several."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers; .ci/client_transformers runs these tests")

import transformers

from megamoe.adapters import transformers as megamoe_hf
from megamoe.adapters.transformers import choice, lend_experts, models
from megamoe.adapters.transformers.from_lm import load_run
from megamoe.adapters.transformers.parallel import has_implementations
from megamoe.checkpoint import load_safetensors
from megamoe.generate import main as main_module
from megamoe.generate.kv import KvBatch
from megamoe.generate.loop import Generator, Record, run
from megamoe.generate.main import generate, main
from megamoe.generate.measure import summarise
from megamoe.generate.options import Options, parse
from megamoe.generate.requests import Request, workload
from megamoe.generate.scheduler import Scheduler
from megamoe.lm import checkpoint
from megamoe.lm.build import build_model
from megamoe.lm.world import from_group
from megamoe.testing.numerics import assert_close
from tests.adapters import hf_case
from tests.lm_case import ALONE, TINY, train
from tests.repo import ROOT

END = 2  # the tiny models' eos_token_id, which transformers' own generate stops at


def requests() -> list[Request]:
    return workload(7, prompt_length=8, new_tokens=6, vocabulary=hf_case.VOCABULARY, seed=3)


def generated(model: Any, request: Request) -> list[int]:
    """transformers' own continuation of one prompt, alone in its batch."""
    ids = torch.tensor([request.prompt])
    config = transformers.GenerationConfig(max_new_tokens=request.max_new_tokens, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return out[0, len(request.prompt) :].tolist()


def generator(model: Any, mine: list[Request], rows: int, **changes: Any) -> Generator:
    scheduler = Scheduler(mine, max_rows=rows, max_prefill_tokens=30, stop=[END])
    arguments = {"make_cache": models.make_cache, "idle": lambda: lend_experts(model), "device": torch.device("cpu")}
    return Generator(model, scheduler, **(arguments | changes))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_tokens_are_transformers_own(family: str) -> None:
    """Seven requests through three rows; gpt-oss's window of 16 is shorter than most texts."""
    megamoe_hf.register()
    model = hf_case.model(family)
    if family == "gpt_oss":
        assert max(len(r.prompt) + r.max_new_tokens for r in requests()) > 17
    expected = {r.id: generated(model, r) for r in requests()}
    model.set_experts_implementation("megamoe")
    for rows in (1, 3):
        work = generator(model, requests(), rows)
        records = run(work, ALONE)
        assert {r.id: r.output for r in work.scheduler.finished} == expected
        assert sum(r.requests for r in records) == sum(len(tokens) for tokens in expected.values())
        assert any(r.stopped for r in work.scheduler.finished) or family != "qwen3_moe"
        assert len(work.kv) == 0 and not any(r.kind == "idle" for r in records)


def test_a_drawn_text_does_not_depend_on_its_company() -> None:
    model = hf_case.model("qwen3_moe")
    texts = []
    for rows in (1, 4):
        work = generator(model, requests(), rows, temperature=1.0, seed=5)
        run(work, ALONE)
        texts.append({r.id: r.output for r in work.scheduler.finished})
    other = generator(model, requests(), 4, temperature=1.0, seed=6)
    run(other, ALONE)
    assert texts[0] == texts[1] != {r.id: r.output for r in other.scheduler.finished}


def _spread(rank: int, world_size: int, group: Any, experts: str, shares: list[list[int]]) -> Any:
    megamoe_hf.register()
    world = from_group(device="cpu")
    model = hf_case.model("qwen3_moe")
    models._keep_parts(model, world)
    choice.choose(model, experts, world, megamoe_hf.Settings())
    mine = [r for r in requests() if r.id in shares[rank]]
    work = generator(model, mine, 2)
    records = run(work, world)
    figures = summarise(records, 1.0 + rank, world)
    return {r.id: r.output for r in work.scheduler.finished}, [r.kind for r in records], figures


@pytest.mark.parametrize("experts", ["megamoe", "eager", "grouped_mm"])
@pytest.mark.parametrize("shares", [[[0, 2, 3, 5], [1, 4, 6]], [[], [0, 1, 2, 3, 4, 5, 6]]], ids=["uneven", "one idle"])
def test_ranks_serve_their_own_requests_and_step_together(ranks: Any, experts: str, shares: list[list[int]]) -> None:
    if experts != "megamoe" and not has_implementations():
        with pytest.raises(ValueError, match=f"can't spread {experts} experts over ranks"):
            ranks(2).run(_spread, experts, shares)
        return
    model = hf_case.model("qwen3_moe")
    expected = {r.id: generated(model, r) for r in requests()}
    results = ranks(2).run(_spread, experts, shares)
    for rank, (texts, kinds, figures) in enumerate(results):
        assert texts == {i: expected[i] for i in shares[rank]}
        assert len(kinds) == len(results[0][1]) == figures.steps
        assert kinds.count("decode") > 0 if shares[rank] else set(kinds) == {"idle"}
        assert figures.requests == 7 and figures.new_tokens == sum(len(t) for t in expected.values())
        assert figures.tokens_per_second == pytest.approx(figures.new_tokens / 2.0)
        assert figures == results[0][2]
        assert figures.idle_steps == sum(k.count("idle") for _, k, _ in results)


def test_figures_are_those_of_the_records() -> None:
    records = [Record("prefill", 30, 3, 0.5), *(Record("decode", 3, 3, s / 1000) for s in (4, 1, 2, 3, 5))]
    figures = summarise(records, 2.0, ALONE)
    assert (figures.new_tokens, figures.prompt_tokens, figures.decode_steps) == (18, 30, 5)
    assert figures.tokens_per_second == 9.0 and figures.prefill_tokens_per_second == 60.0
    assert figures.us == pytest.approx(3000) and figures.us_p90 == pytest.approx(4600) and figures.decode_rows == 3
    assert summarise([Record("prefill", 5, 1, 0.5)], 1.0, ALONE).us is None


def test_a_run_of_the_training_job_is_the_same_network(tmp_path: Path) -> None:
    options = dataclasses.replace(TINY, steps=6, out=str(tmp_path / "run"))
    train(options, ALONE)
    ours = build_model(options, ALONE)
    load_safetensors(ours, checkpoint.find(tmp_path / "run"))
    theirs = load_run(tmp_path / "run").eval()
    tokens = torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = ours(tokens)
        assert expected.abs().max() > 0.1
        assert_close(theirs(input_ids=tokens).logits, expected, whole=1e-10, row=1e-9, what="logits")
    bias = dataclasses.replace(TINY, steps=1, balance="bias", out=str(tmp_path / "bias"))
    train(bias, ALONE)
    with pytest.raises(ValueError, match="only runs with --balance aux"):
        load_run(tmp_path / "bias")


def test_rows_are_written_and_peers_stand_beside_ours(tmp_path: Path) -> None:
    options = Options(
        tiny=True, experts=("megamoe", "grouped_mm"), batch=(2,), new_tokens=3, prompt_length=4, commit="abc",
        results=str(tmp_path),
    )  # fmt: skip
    runs = generate(options, ALONE, command="generate.py --tiny")
    (path,) = tmp_path.glob("generate-*.json")
    rows = {row["engine"]: row for row in json.loads(path.read_text())["rows"]}
    assert set(rows) == {"staged", "grouped_mm"} and len(runs) == 2
    ours = rows["staged"]
    peer = f"transformers-{transformers.__version__}:grouped_mm"
    assert ours["peers"] == {peer: rows["grouped_mm"]["us"]}
    assert (ours["model"], ours["tokens"], ours["world_size"]) == ("qwen3-30b-tiny-2-layers", 2, 1)
    assert ours["commit"] == "abc" and ours["us"] <= ours["us_p90"] <= ours["us_p99"] and ours["requests"] == 4
    # Texts of another length are another case, the same ones again are not.
    for new_tokens in (2, 3):
        generate(dataclasses.replace(options, experts=("megamoe",), new_tokens=new_tokens), ALONE, command="again")
    rows = json.loads(path.read_text())["rows"]
    assert sorted((r["engine"], r["new_tokens_each"], r["command"]) for r in rows) == [
        ("grouped_mm", 3, "generate.py --tiny"), ("staged", 2, "again"), ("staged", 3, "again"),
    ]  # fmt: skip
    assert {r["warm_up"] for r in rows} == {"start"}


def test_each_batch_can_have_its_number_of_requests() -> None:
    options = Options(tiny=True, batch=(1, 2), new_tokens=2, prompt_length=4)
    for requests, counts in (((0,), [2, 4]), ((3,), [3, 3]), ((1, 5), [1, 5])):
        runs = generate(dataclasses.replace(options, requests=requests), ALONE, command="")
        assert [figures.requests for _, _, figures in runs] == counts


@pytest.mark.parametrize("warm_up", ["start", "whole"])
@pytest.mark.parametrize("captures", [False, True])
def test_what_runs_before_the_figures(captures: bool, warm_up: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps; graphs, which leave torch without spare memory, and the steps again; all requests if asked."""
    served: list[Any] = []

    def serve(generator: Generator, *arguments: Any, **more: Any) -> list[Record]:
        served.append([r.max_new_tokens for r in generator.scheduler.waiting])
        records = run(generator, *arguments, **more)
        assert not generator.scheduler.pending
        return records

    class Captures(KvBatch):
        def capture(self, call: Any) -> None:
            served.append("graphs")

    monkeypatch.setattr(main_module, "run", serve)
    if captures:
        monkeypatch.setattr("megamoe.generate.loop.KvBatch", Captures)
        monkeypatch.setattr(main_module, "RowBatch", Captures)
    options = Options(tiny=True, batch=(2,), new_tokens=8, prompt_length=4, warm_up=warm_up)
    ((_, _, figures),) = generate(options, ALONE, command="")
    few, everything = served[0], served[-1]
    assert len(few) == 2 and max(few) <= 4 and len(everything) == 4 and max(everything) > 4
    assert served[1:-1] == (["graphs", few] if captures else []) + ([everything] if warm_up == "whole" else [])
    assert figures.requests == 4 and figures.new_tokens == sum(everything)


def test_a_call_that_ends_early_leaves_the_rows_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, cudnn = [], []

    def fails_with_eager(model: Any, name: str, *arguments: Any) -> None:
        taken.append(name)
        cudnn.append(torch.backends.cuda.cudnn_sdp_enabled())
        if taken.count("eager") == 2:  # the first time is the check that it can be taken
            raise RuntimeError("planted")
        choose(model, name, *arguments)

    choose = choice.choose
    monkeypatch.setattr(choice, "choose", fails_with_eager)
    options = Options(
        tiny=True, experts=("grouped_mm", "eager"), batch=(1,), new_tokens=3, prompt_length=4, commit="abc",
        results=str(tmp_path),
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="planted"):
        generate(options, ALONE, command="generate.py --tiny")
    (path,) = tmp_path.glob("generate-*.json")
    assert [row["engine"] for row in json.loads(path.read_text())["rows"]] == ["grouped_mm"]
    # The attention that plans for each length is left out, and only meanwhile.
    assert not any(cudnn) and torch.backends.cuda.cudnn_sdp_enabled()


def test_a_call_tells_where_it_stands(tmp_path: Path) -> None:
    """--stacks-after: a rank that waits for another one, which never comes."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    script = str(ROOT / "launch_scripts" / "generate.py")
    with open(tmp_path / "stderr", "w+") as errors:
        process = subprocess.Popen(
            [sys.executable, script, "--tiny", "--stacks-after", "1"], env=environment, stderr=errors
        )
        try:
            for _ in range(600):
                errors.seek(0)
                if " in join\n" in errors.read():
                    break
                time.sleep(0.1)
            else:
                pytest.fail("no stack within a minute")
        finally:
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "nothing-here"], "--model must be one of qwen3-30b, gpt-oss-20b, mixtral-8x7b, a directory"),
        (["--tiny", "--prompt", "Hello"], "--prompt needs a model with a tokenizer, qwen3-30b-tiny-2-layers has none"),
        (["--tiny", "--batch", "0"], "--batch must be at least 1"),
        (["--tiny", "--batch", "1", "2", "--requests", "1", "2", "3"], "one for each of 2 --batch"),
        (["--tiny", "--requests", "-1"], "from 0, got"),
        (["--model", str(ROOT), "--tiny"], "have sizes of its own|has sizes of its own"),
    ],
)
def test_wrong_choices_end_in_a_sentence(arguments: list[str], says: str, capsys: Any) -> None:
    assert main(["--device", "cpu", *arguments], launched=False) == 2
    assert re.search(says, capsys.readouterr().err)


def test_options_are_read() -> None:
    options = parse(["--batch", "1", "16", "--experts", "eager", "megamoe", "--tiny", "--temperature", "0.5"])
    assert options == Options(batch=(1, 16), experts=("eager", "megamoe"), tiny=True, temperature=0.5)


def test_torchrun_generates_from_a_directory_and_from_a_trained_model(tmp_path: Path) -> None:
    """The page's commands, on two ranks: random weights, saved ones, and text from the byte model."""
    hf_case.model("mixtral").save_pretrained(tmp_path / "saved")
    train(dataclasses.replace(TINY, steps=4, out=str(tmp_path / "run")), ALONE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = str(ROOT / "launch_scripts" / "generate.py")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "CUDA_VISIBLE_DEVICES": ""}
    small = ["--batch", "2", "--new-tokens", "4", "--prompt-length", "4"]
    for arguments, says in (
        (["--model", str(tmp_path / "saved"), *small], r"saved, loaded in [\d.]+ s; experts: megamoe"),
        (["--model", str(tmp_path / "run"), "--new-tokens", "5", "--prompt", "def ", "import "], "import "),
    ):
        command = [*torchrun, script, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=250)
        assert done.returncode == 0, done.stderr[-3000:]
        assert re.search(says, done.stdout), done.stdout
        assert re.search(r"megamoe +\d+ +\d+ +[\d.]+ +[\d.]+", done.stdout), done.stdout
