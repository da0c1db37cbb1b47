"""The main job: the same curve for any number of ranks, checkpoints for any number, deaths that are named."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megamoe.lm import checkpoint
from megamoe.lm.build import build_model, experts_zeroed, moe_layers
from megamoe.lm.console import Console
from megamoe.lm.data import Corpus, load_corpus, standard_library, unigram_bits
from megamoe.lm.main import main
from megamoe.lm.model import rotary_table, rotate
from megamoe.lm.optim import learning_rate, reduce_gradients
from megamoe.lm.options import Options, merge, parser
from megamoe.lm.train import Trainer, imbalance
from megamoe.lm.world import World, choose_device, from_group

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "launch_scripts" / "train_lm.py"
TINY = Options(
    device="cpu",
    hidden=32,
    layers=2,
    heads=2,
    experts=12,
    top_k=2,
    intermediate=16,
    length=24,
    batch=8,
    steps=12,
    warmup=2,
    log_every=4,
    eval_every=6,
    eval_sequences=20,
    save_every=5,
    sample=12,
)
ALONE = World(0, 1, None, torch.device("cpu"), "")


def corpus(options: Options = TINY) -> Corpus:
    if options.text:
        return load_corpus(Path(options.text), length=options.length)
    files = standard_library()[:20]
    data = [torch.frombuffer(bytearray(f.read_bytes()[:4000]), dtype=torch.uint8) for f in files]
    return Corpus(torch.cat(data[:-1]), data[-1], "twenty pieces")


def train(options: Options, world: World, resume: Path | None = None) -> tuple[Trainer, dict[str, object]]:
    with Console(steps=options.steps, speaks=False) as console:
        trainer = Trainer(options, world, corpus(options), console, resume=resume)
        return trainer, trainer.run()


def _train_rank(rank, world_size, group, options, resume=None):
    trainer, summary = train(options, from_group(device="cpu"), resume)
    return dataclasses.asdict(trainer.history), summary


def curve(history: dict[str, list[tuple[int, float]]]) -> list[float]:
    return [bits for _, bits in history["train"]]


# --- one global batch, any number of ranks -------------------------------------------------------------------------


@pytest.mark.parametrize("balance", ["aux", "bias"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_have_the_loss_curve_of_one(ranks, tmp_path, world_size, balance):
    """12 steps in fp32; 3 ranks have 3, 3 and 2 of the 8 sequences. Only the order of sums differs."""
    options = dataclasses.replace(TINY, balance=balance, out=str(tmp_path / "one"))
    alone, summary = train(options, ALONE)
    options = dataclasses.replace(options, out=str(tmp_path / "more"))
    results = ranks(world_size).run(_train_rank, options)
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
    got = curve(ranks(2).run(_train_rank, options)[0][0])
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


# --- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "then"), [(1, 1), (2, 1), (1, 3), (2, 4)])
@pytest.mark.parametrize("balance", ["aux", "bias"])
def test_resuming_with_other_ranks_continues_the_curve(ranks, tmp_path, first, then, balance):
    def go(world_size: int, options: Options, resume: Path | None = None) -> dict[str, list[tuple[int, float]]]:
        if world_size == 1:
            return dataclasses.asdict(train(options, ALONE, resume)[0].history)
        return ranks(world_size).run(_train_rank, options, resume)[0][0]

    options = dataclasses.replace(TINY, balance=balance, out=str(tmp_path))
    whole = go(first, options)
    names = [p.name for p in checkpoint.list_checkpoints(tmp_path)]
    assert names == ["checkpoint-000010.safetensors", "checkpoint-000012.safetensors"]  # 5 was dropped
    (tmp_path / names[1]).unlink()
    resumed = go(then, options, checkpoint.find(tmp_path))
    if first == then:
        assert curve(resumed) == curve(whole)
    assert curve(resumed)[:10] == curve(whole)[:10]
    assert curve(resumed)[10:] == pytest.approx(curve(whole)[10:], abs=2e-4)
    assert [step for step, _ in resumed["held_out"]] == [6, 12]


def test_a_crash_beside_a_checkpoint_leaves_it_alone(tmp_path):
    out = tmp_path / "run"
    train(dataclasses.replace(TINY, steps=2, out=str(out)), ALONE)
    (path,) = checkpoint.list_checkpoints(out)
    (out / ".checkpoint-000009.safetensors.partial").write_bytes(b"half of one")
    assert checkpoint.find(out) == checkpoint.find(tmp_path) == path
    assert checkpoint.read_state(path)["options"]["experts"] == 12


def test_what_cannot_be_resumed_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"--resume found no checkpoint"):
        checkpoint.find(tmp_path)
    broken = tmp_path / "checkpoint-000001.safetensors"
    broken.write_bytes(b"\x10\0\0\0\0\0\0\0nonsense")
    with pytest.raises(ValueError, match="is not a readable checkpoint"):
        checkpoint.read_state(broken)
    broken.unlink()
    save_file({"x": torch.zeros(1)}, broken)
    with pytest.raises(ValueError, match=r"must carry .* in its header"):
        checkpoint.read_state(broken)
    broken.unlink()
    train(dataclasses.replace(TINY, steps=1, out=str(tmp_path)), ALONE)
    saved = checkpoint.read_state(checkpoint.find(tmp_path))["options"]
    with pytest.raises(ValueError, match=r"--experts is 12 in the checkpoint, got 8: start a new run"):
        merge({"experts": 8}, saved)
    assert merge({"steps": 7, "experts": 12}, saved) == dataclasses.replace(TINY, steps=7, out=str(tmp_path))
    other = Corpus(*(2 * [torch.zeros(500, dtype=torch.uint8)]), "zeros")
    with pytest.raises(ValueError, match="the text differs from the one the checkpoint was trained on"):
        Trainer(TINY, ALONE, other, Console(steps=1, speaks=False), resume=checkpoint.find(tmp_path))


# --- what the figures mean -----------------------------------------------------------------------------------------


def test_zeroing_the_experts_is_undone_bit_for_bit():
    model = build_model(TINY, ALONE)
    before = {n: p.clone() for n, p in model.named_parameters()}
    x = torch.randn(3, 5, 32)
    with experts_zeroed(model):
        assert all((layer(x) == 0).all() for layer in moe_layers(model))
    assert all((layer(x) != 0).any() for layer in moe_layers(model))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_unigram_entropy():
    assert unigram_bits(torch.arange(256, dtype=torch.uint8)) == 8
    text = b"abracadabra"
    want = -sum(n / 11 * math.log2(n / 11) for n in Counter(text).values())
    assert unigram_bits(torch.tensor(list(text), dtype=torch.uint8)) == pytest.approx(want)


def test_imbalance_and_learning_rate():
    assert imbalance([[3, 3, 3], [1, 1, 4]]) == 2.0
    rate = [learning_rate(s, steps=100, warmup=9, highest=1.0) for s in range(100)]
    assert rate[0] == pytest.approx(0.1) and max(rate) == rate[9] and 0.05 < rate[-1] < 0.07


def test_text_is_split_and_cut_the_same_way_every_time():
    text = load_corpus(None, length=64)
    assert text.digest == load_corpus(None, length=64).digest
    assert len(text.train) > 10 * len(text.held_out) > 1_000_000
    first, again = (text.batch(step=3, seed=0, sequences=4, length=64) for _ in range(2))
    assert torch.equal(first, again) and first.shape == (4, 65) and first.max() < 256
    assert not torch.equal(first, text.batch(step=4, seed=0, sequences=4, length=64))
    pieces = text.evaluation(sequences=10, length=64)
    assert pieces.shape == (10, 65)
    assert torch.equal(pieces[0], text.held_out[:65].long())


def test_own_text_and_too_little_of_it(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"x" * 100_000)
    (tmp_path / "a.txt").write_bytes(bytes(range(256)) * 1000)
    text = load_corpus(tmp_path, length=16)
    assert len(text.train) + len(text.held_out) == 356_000 and 10_000 < len(text.held_out) < 30_000
    assert text.train[1] == 1  # a.txt comes first
    with pytest.raises(ValueError, match="does not exist"):
        load_corpus(tmp_path / "c", length=16)
    (tmp_path / "a.txt").write_bytes(b"short")
    with pytest.raises(ValueError, match="leaves 5 bytes of training text, and a sequence needs 17"):
        load_corpus(tmp_path / "a.txt", length=16)


def test_rotary_positions_are_relative():
    cos, sin = rotary_table(12, 8, torch.device("cpu"))
    q, k = torch.randn(8), torch.randn(8)
    queries, keys = rotate(q.expand(12, 8), cos, sin), rotate(k.expand(12, 8), cos, sin)
    score = (queries[3:] * keys[:-3]).sum(-1)
    torch.testing.assert_close(score, score[:1].expand(9))


def test_no_byte_sees_the_next():
    model = build_model(TINY, ALONE)
    torch.nn.init.normal_(model.head.weight)
    tokens = torch.randint(256, (1, 10))
    changed = tokens.clone()
    changed[0, 7] += 1
    changed %= 256
    difference = (model(tokens) - model(changed)).abs().amax(-1)[0]
    assert difference[:7].max() < 1e-4 and difference[7:].min() > 1e-2


# --- what it says --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "gpus", "local_ranks", "cuda", "sentence"),
    [
        ("auto", 0, 2, False, "no GPU on this host: 2 ranks on the CPU, over gloo."),
        ("auto", 2, 2, True, "2 ranks on 2 GPUs, over NCCL."),
        ("auto", 1, 1, True, "1 rank on 1 GPU."),
        ("cpu", 8, 4, False, "4 ranks on the CPU, as asked for."),
        (
            "auto", 1, 4, False,
            "4 ranks but 1 GPU on this host, and NCCL needs a GPU for each rank: training on the CPU over gloo "
            "instead. Start with --nproc-per-node=1 to use the GPU.",
        ),
    ],
)  # fmt: skip
def test_devices_are_chosen_in_a_sentence(wanted, gpus, local_ranks, cuda, sentence):
    assert choose_device(wanted, gpus=gpus, local_ranks=local_ranks) == (cuda, sentence)


def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="--device cuda needs a GPU for each rank, got 2 ranks and 1 GPU on this host"):
        choose_device("cuda", gpus=1, local_ranks=2)


def test_bad_options_are_refused_in_a_sentence():
    with pytest.raises(ValueError, match="--eval-every must be at least 1, got 0"):
        Options(eval_every=0)
    with pytest.raises(ValueError, match="--clip must be greater than 0"):
        Options(clip=0.0)
    three = World(0, 3, None, torch.device("cpu"), "")
    with pytest.raises(
        ValueError, match=r"--experts must be divisible by the number of ranks \(3\), got 8: try --experts 9"
    ):
        build_model(dataclasses.replace(TINY, experts=8), three)
    assert vars(parser().parse_args(["--steps", "3"])) == {"resume": None, "steps": 3}


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "--device", "cpu", *arguments]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def torchrun(num_ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    return subprocess.run(
        [*launcher, str(SCRIPT), *arguments],
        env=environment(), capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip


def arguments_of(options: Options) -> list[str]:
    given = {name: value for name, value in dataclasses.asdict(options).items() if value != "" and name != "device"}
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]


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
            assert f"rank {survivor} stops: rank 1 " in errors, errors
        assert time.monotonic() - killed < 20 + 10
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    path = checkpoint.find(out)
    step = checkpoint.read_state(path)["step"]
    assert step < 60
    resumed = ranks(3).run(_train_rank, options, path)[0][0]
    whole = ranks(3).run(_train_rank, dataclasses.replace(options, out=str(tmp_path / "whole")))[0][0]
    assert len(curve(whole)) == 60 and curve(resumed) == curve(whole)
