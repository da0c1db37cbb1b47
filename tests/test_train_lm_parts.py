"""The main job piece by piece: text, model, figures, devices, options."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import pytest
import torch

from megamoe.lm.build import build_model, experts_zeroed, moe_layers
from megamoe.lm.data import load_corpus, unigram_bits
from megamoe.lm.model import rotary_table, rotate
from megamoe.lm.optim import learning_rate
from megamoe.lm.options import Options, parser
from megamoe.lm.train import imbalance
from megamoe.lm.world import World, choose_device
from tests.lm_case import ALONE, TINY


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
