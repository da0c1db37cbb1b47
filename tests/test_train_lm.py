"""The main job: one curve for any number of ranks, the README's command, a death that is named."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import signal
import socket
import subprocess
import time

import pytest
import torch

from megamoe.lm import checkpoint
from megamoe.lm.build import build_model
from megamoe.lm.data import standard_library
from megamoe.lm.main import main
from megamoe.lm.optim import reduce_gradients
from megamoe.lm.options import Options
from megamoe.lm.world import World, from_group
from tests.lm_case import ALONE, TINY, arguments_of, command, curve, environment, torchrun, train, train_rank


@pytest.mark.parametrize("balance", ["aux", "bias"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_have_the_loss_curve_of_one(ranks, tmp_path, world_size, balance):
    """12 steps in fp32; 3 ranks have 3, 3 and 2 of the 8 sequences. Only the order of sums differs."""
    options = dataclasses.replace(TINY, balance=balance, out=str(tmp_path / "one"))
    alone, summary = train(options, ALONE)
    options = dataclasses.replace(options, out=str(tmp_path / "more"))
    results = ranks(world_size).run(train_rank, options)
    for history, other in results:
        assert curve(history) == pytest.approx(curve(dataclasses.asdict(alone.history)), abs=2e-4)
        assert history["held_out"] == [(step, pytest.approx(bits, abs=2e-4)) for step, bits in alone.history.held_out]
        assert other["parameters"] == summary["parameters"]
    one = curve(dataclasses.asdict(alone.history))
    assert one[0] == pytest.approx(8.0, abs=1e-5) and one[-1] < 7.5


def test_same_seed_same_bits_other_seed_other_curve(tmp_path):
    histories = []
    for i, seed in enumerate((0, 0, 1)):
        options = dataclasses.replace(TINY, seed=seed, steps=4, out=str(tmp_path / str(i)))
        histories.append(curve(dataclasses.asdict(train(options, ALONE)[0].history)))
    assert histories[0] == histories[1] != histories[2]


def _gradients(rank, world_size, group, options, clip):
    world = from_group(device="cpu")
    return gradients(options, world, clip)


def gradients(options: Options, world: World, clip: float) -> tuple[dict[str, torch.Tensor], float]:
    """Gradients of the mean square of the logits of 5 sequences, as the optimiser sees them on this rank."""
    model = build_model(options, world)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(3))
    tokens = world.share(torch.randint(256, (5, 9), generator=torch.Generator().manual_seed(2)))
    loss = model(tokens).square().mean(-1).sum() * (world.size / 45)
    loss.backward()
    mean, norm = reduce_gradients(model, world, loss, clip=clip)
    grads = {name: p.grad for name, p in model.named_parameters()}
    return grads | {"loss": torch.tensor(mean)}, norm


@pytest.mark.parametrize("clip", [1e9, 0.01])
def test_gradients_and_their_norm_are_those_of_one_rank(ranks, clip):
    """2, 2 and 1 sequences and 4 experts on each of 3 ranks: nothing is scaled by a number of ranks."""
    alone, norm = gradients(TINY, ALONE, clip)
    results = ranks(3).run(_gradients, TINY, clip)
    assert [r[1] for r in results] == pytest.approx([norm] * 3, rel=1e-5)
    for rank, (grads, _) in enumerate(results):
        for name, grad in grads.items():
            whole = alone[name][4 * rank : 4 * rank + 4] if ".experts." in name else alone[name]
            torch.testing.assert_close(grad, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))
    alone.pop("loss")
    size = math.sqrt(sum(float(g.square().sum()) for g in alone.values()))
    assert size == pytest.approx(min(clip, norm), rel=1e-4)


@pytest.mark.parametrize("changes", [{"recipe": "bf16"}, {"engine": "reference"}])
def test_other_recipes_and_engines_train_alike(ranks, tmp_path, changes):
    options = dataclasses.replace(TINY, steps=6, out=str(tmp_path / "fp32"))
    want = curve(dataclasses.asdict(train(options, ALONE)[0].history))
    options = dataclasses.replace(options, out=str(tmp_path / "other"), **changes)
    got = curve(ranks(2).run(train_rank, options)[0][0])
    assert got == pytest.approx(want, abs=0.02 if "recipe" in changes else 2e-4)


def _refuse_on_one(rank, world_size, group):
    def work() -> int:
        if rank == 1:
            raise ValueError("no text here")
        return rank

    world = from_group(device="cpu")
    with pytest.raises(ValueError, match=r"no text here \(rank 1\)"):
        world.together(work, "reading")
    return world.together(lambda: rank + 10, "reading")


def test_what_one_rank_refuses_all_refuse(ranks):
    assert ranks(3).run(_refuse_on_one) == [10, 11, 12]


def test_one_process_without_torchrun_refuses_and_resumes(tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["--device", "cpu", *arguments_of(dataclasses.replace(TINY, out=str(out)))]
    assert main(arguments, launched=False) == 0
    said = capsys.readouterr().out
    assert "1 rank on the CPU, as asked for." in said and "a sample" in said
    assert main(arguments, launched=False) == 2
    assert "holds a run already: go on with --resume" in capsys.readouterr().err
    assert main(["--resume", str(out), "--steps", "14"], launched=False) == 0
    assert "at step 12." in capsys.readouterr().out
    assert checkpoint.find(out).name == "checkpoint-000014.safetensors"


def test_torchrun_trains_real_text_and_the_experts_matter(tmp_path):
    """The default model for 60 of its steps; the whole default run is for continuous integration."""
    arguments = ["--steps", "60", "--eval-sequences", "64", "--sample", "8", "--out", str(tmp_path)]
    done = torchrun(2, "--device", "cpu", *arguments)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["ranks"] == 2 and summary["steps"] == 60
    assert 4.2 < summary["unigram_bits_per_byte"] < 5
    assert summary["held_out_bits_per_byte"] < 3.9
    assert summary["without_experts_bits_per_byte"] > summary["held_out_bits_per_byte"] + 0.3
    assert summary["load_max_over_mean"] < 3
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    assert "tokens/s" in done.stdout and "2 ranks" in done.stdout


def test_a_killed_rank_is_named_and_the_run_resumes(ranks, tmp_path):
    """Three ranks over gloo, started by hand; rank 1 dies by SIGKILL; the others say so and exit with status 1."""
    text, out = tmp_path / "text", tmp_path / "killed"
    text.write_bytes(b"".join(f.read_bytes() for f in standard_library()[:20]))
    options = dataclasses.replace(TINY, steps=60, text=str(text), out=str(out))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "3", "MEGAMOE_TIMEOUT_S": "20"}
    processes = [
        subprocess.Popen(
            command(*arguments_of(options)), env=environment(RANK=str(r), **variables), stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True,
        )
        for r in range(3)
    ]  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not checkpoint.list_checkpoints(out):
            assert time.monotonic() < deadline and processes[0].poll() is None
            time.sleep(0.02)
        processes[1].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        for survivor in (0, 2):
            _, errors = processes[survivor].communicate(timeout=60)
            assert processes[survivor].returncode == 1
            # gloo tells rank 2 through rank 0, which may have left with its own sentence by then
            assert re.search(rf"rank {survivor} stops: rank (0, )?1 did not arrive", errors), errors
        assert time.monotonic() - killed < 20 + 10
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    path = checkpoint.find(out)
    step = checkpoint.read_state(path)["step"]
    assert step < 60
    resumed = ranks(3).run(train_rank, options, path)[0][0]
    whole = ranks(3).run(train_rank, dataclasses.replace(options, out=str(tmp_path / "whole")))[0][0]
    assert len(curve(whole)) == 60 and curve(resumed) == curve(whole)
