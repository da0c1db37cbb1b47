"""Routers against the formulas of their papers, written out here token by token in float64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from megamoe.router import PRESETS, Router, RouterConfig

H = 16


def build(config: RouterConfig, seed: int = 0) -> Router:
    torch.manual_seed(seed)
    router = Router(config)
    if router.expert_bias is not None:
        router.expert_bias.normal_(std=0.2)
    if router.bias is not None:
        torch.nn.init.normal_(router.bias)
    return router


def logits_of(router: Router, x: torch.Tensor) -> torch.Tensor:
    out = x.double() @ router.weight.double().T
    return out if router.bias is None else out + router.bias.double()


def deepseek_v3(s: list[float], b: list[float], c: RouterConfig) -> dict[int, float]:
    """arXiv:2412.19437 eq. 13 to 16 with node-limited routing, on sigmoid scores of one token."""
    size = len(s) // c.num_groups
    biased = [si + bi for si, bi in zip(s, b, strict=True)]
    groups = [range(g * size, (g + 1) * size) for g in range(c.num_groups)]
    rank = sorted(groups, key=lambda g: -sum(sorted((biased[i] for i in g), reverse=True)[: c.group_top]))
    allowed = [i for g in rank[: c.top_groups] for i in g]
    chosen = sorted(allowed, key=lambda i: -biased[i])[: c.top_k]
    total = sum(s[i] for i in chosen)
    return {i: c.scale * s[i] / total for i in chosen}


@pytest.mark.parametrize("scale_of_bias", [0.2, 3.0])
def test_deepseek_v3_choice_and_weights(scale_of_bias: float) -> None:
    config = RouterConfig.preset("deepseek_v3", hidden=H, num_experts=64)
    router = build(config)
    router.expert_bias.normal_(std=scale_of_bias)  # 3.0: many biased scores are negative
    x = torch.randn(50, H)
    idx, weights, _ = router(x)
    assert idx.dtype == torch.int64 and weights.dtype == torch.float32
    scores = torch.sigmoid(logits_of(router, x))
    for t in range(len(x)):
        want = deepseek_v3(scores[t].tolist(), router.expert_bias.tolist(), config)
        got = dict(zip(idx[t].tolist(), weights[t].tolist(), strict=True))
        assert got.keys() == want.keys()
        assert all(math.isclose(got[i], want[i], rel_tol=1e-5) for i in want)
        assert math.isclose(sum(got.values()), 2.5, rel_tol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen3"])
def test_softmax_presets_choose_and_weigh(name: str) -> None:
    """Mixtral and gpt-oss: Softmax(TopK(logits)); Qwen3: softmax over all, top-k, divided by their sum."""
    config = RouterConfig.preset(name, hidden=H, num_experts=16)
    router = build(config)
    assert (router.bias is not None) == (name == "gpt_oss")
    x = torch.randn(40, H)
    idx, weights, _ = router(x)
    for t, row in enumerate(logits_of(router, x).tolist()):
        chosen = sorted(range(16), key=lambda i: -row[i])[: config.top_k]
        if name == "qwen3":
            total = sum(math.exp(v) for v in row)
            p = {i: math.exp(row[i]) / total for i in chosen}
        else:
            p = {i: math.exp(row[i]) for i in chosen}
        assert idx[t].tolist() == chosen
        assert weights[t].tolist() == pytest.approx([p[i] / sum(p.values()) for i in chosen], rel=1e-5)


def test_weights_that_are_not_normalised_are_scaled_probabilities() -> None:
    """DeepSeek-V2 (arXiv:2405.04434): max of a group, plain softmax scores times 16."""
    config = RouterConfig(
        hidden=H, num_experts=16, top_k=3, normalize=False, scale=16.0, num_groups=4, top_groups=2, group_top=1
    )
    router = build(config)
    x = torch.randn(40, H)
    idx, weights, _ = router(x)
    probs = torch.softmax(logits_of(router, x), -1)
    for t, row in enumerate(probs.tolist()):
        groups = sorted(range(4), key=lambda g: -max(row[4 * g : 4 * g + 4]))[:2]
        chosen = sorted((i for g in groups for i in range(4 * g, 4 * g + 4)), key=lambda i: -row[i])[:3]
        assert idx[t].tolist() == chosen
        assert weights[t].tolist() == pytest.approx([16 * row[i] for i in chosen], rel=1e-5)


def test_presets_are_the_published_models() -> None:
    c = RouterConfig.preset("deepseek_v3", hidden=7168)
    assert (c.num_experts, c.top_k, c.num_groups, c.top_groups, c.scale, c.score) == (256, 8, 8, 4, 2.5, "sigmoid")
    assert c.group_top == c.top_k // c.top_groups and c.aux_free
    assert {n: (RouterConfig.preset(n, hidden=8).num_experts, PRESETS[n]["top_k"]) for n in PRESETS} == {
        "deepseek_v3": (256, 8), "qwen3": (128, 8), "gpt_oss": (128, 4), "mixtral": (8, 2),
    }  # fmt: skip


def test_batch_balance_loss_is_switch_transformers_formula() -> None:
    """arXiv:2101.03961 eq. 4: alpha N sum_i f_i P_i; K choices per token share the weight of one."""
    config = RouterConfig(hidden=H, num_experts=8, top_k=2, aux_coef=0.01)
    router = build(config)
    x = torch.randn(3, 10, H)
    idx, _, losses = router(x)
    p = torch.softmax(logits_of(router, x.reshape(-1, H)), -1)
    f = [sum(i in row for row in idx.tolist()) / (2 * 30) for i in range(8)]
    want = 0.01 * 8 * sum(f[i] * p[:, i].mean().item() for i in range(8))
    assert losses.keys() == {"aux"} and losses["aux"].item() == pytest.approx(want, rel=1e-5)


def test_batch_balance_loss_is_one_when_balanced() -> None:
    config = RouterConfig(hidden=8, num_experts=8, top_k=1, aux_coef=1.0)
    router = Router(config)
    with torch.no_grad():
        router.weight.copy_(50 * torch.eye(8))
    assert router(torch.eye(8))[2]["aux"].item() == pytest.approx(1.0, rel=1e-6)
    assert router(torch.eye(8)[:1].expand(8, 8))[2]["aux"].item() == pytest.approx(8.0, rel=1e-6)


def test_sequence_balance_loss_is_deepseek_v3s_formula() -> None:
    """arXiv:2412.19437 eq. 17 to 20, whose f_i counts the K best plain scores, whatever bias and groups choose."""
    config = RouterConfig.preset("deepseek_v3", hidden=H, num_experts=16, seq_aux_coef=0.5)
    router = build(config)
    router.expert_bias.normal_(std=1.0)
    x = torch.randn(3, 7, H)
    losses = router(x)[2]
    values = []
    for b in range(3):
        s = torch.sigmoid(logits_of(router, x[b])).tolist()
        top = [set(sorted(range(16), key=lambda i: -row[i])[:8]) for row in s]
        f = [16 / (8 * 7) * sum(i in chosen for chosen in top) for i in range(16)]
        prob = [sum(row[i] / sum(row) for row in s) / 7 for i in range(16)]
        values.append(0.5 * sum(fi * pi for fi, pi in zip(f, prob, strict=True)))
    assert losses["seq_aux"].item() == pytest.approx(sum(values) / 3, rel=1e-5)


def test_z_loss_is_st_moes_formula() -> None:
    config = RouterConfig(hidden=H, num_experts=8, top_k=2, z_coef=1e-3)
    router = build(config)
    x = torch.randn(20, H)
    want = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits_of(router, x).tolist()) / 20
    assert router(x)[2]["z"].item() == pytest.approx(1e-3 * want, rel=1e-5)


def test_bias_update_is_the_papers_rule_and_balances() -> None:
    """arXiv:2408.15664 algorithm 1: b_i += u sign(mean c - c_i); repeated, it evens out a skewed gate."""
    config = RouterConfig(hidden=H, num_experts=8, top_k=2, score="sigmoid", aux_free=True, bias_update_rate=0.005)
    router = build(config)
    router.expert_bias.zero_()
    with torch.no_grad():
        router.weight[0] *= 6  # expert 0 has the largest and the smallest scores
    x = torch.randn(400, H) + 0.5
    before = router.expert_bias.clone()
    idx, _, _ = router(x)
    load = [sum(i in row for row in idx.tolist()) for i in range(8)]
    assert router.load.tolist() == load
    router.update_bias()
    want = [0.005 * ((sum(load) / 8 > n) - (sum(load) / 8 < n)) for n in load]
    assert (router.expert_bias - before).tolist() == pytest.approx(want, abs=1e-7)
    assert router.load.sum() == 0
    for _ in range(300):
        router(x)
        router.update_bias()
    router(x)
    assert max(load) / 100 > 1.5 and router.load.max().item() / 100 < 1.1


def test_bias_does_not_touch_weights_or_receive_gradient() -> None:
    config = RouterConfig(hidden=H, num_experts=4, top_k=4, score="sigmoid", aux_free=True)
    router = build(config)
    x = torch.randn(9, H)
    before = torch.zeros(9, 4).scatter(1, *router(x)[:2])
    router.expert_bias += torch.randn(4)
    after = torch.zeros(9, 4).scatter(1, *router(x)[:2])
    torch.testing.assert_close(after, before)  # the bias changes the order of the four, and so of their sum
    assert [name for name, _ in router.named_parameters()] == ["weight"]


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_gradient_of_weights_and_losses_reaches_the_gate(name: str) -> None:
    """Against central differences in the direction of the gradient; the choice is held by a small step."""
    config = RouterConfig.preset(name, hidden=H, num_experts=16, aux_coef=0.1, seq_aux_coef=0.1, z_coef=0.1)
    router = build(config).train()
    x = torch.randn(2, 6, H)
    pull = torch.randn(12, config.top_k)

    def value() -> torch.Tensor:
        _, weights, losses = router(x)
        assert losses.keys() == {"aux", "seq_aux", "z"}
        return (weights * pull).sum() + sum(losses.values())

    (grad,) = torch.autograd.grad(value(), router.weight)
    direction = grad / grad.norm()
    step = 1e-3
    with torch.no_grad():
        router.weight += step * direction
        up = value()
        router.weight -= 2 * step * direction
        down = value()
    assert (up - down).item() / (2 * step) == pytest.approx(grad.norm().item(), rel=2e-2)


def test_padding_changes_nothing_for_the_rest() -> None:
    config = RouterConfig.preset("deepseek_v3", hidden=H, num_experts=16, aux_coef=0.1, seq_aux_coef=0.1, z_coef=0.1)
    router = build(config)
    x = torch.randn(1, 6, H)
    idx, weights, losses = router(x)
    load = router.load.clone()
    router.reset_load()
    padded = torch.cat([x, torch.randn(1, 3, H)], dim=1)
    mask = torch.tensor([[True] * 6 + [False] * 3])
    idx2, weights2, losses2 = router(padded, mask)
    assert torch.equal(idx2[:6], idx) and torch.equal(weights2[:6], weights)
    assert (idx2[6:] == -1).all() and (weights2[6:] == 0).all()
    assert torch.equal(router.load, load)
    for name, loss in losses.items():
        torch.testing.assert_close(losses2[name], loss)


def test_nothing_to_route() -> None:
    config = RouterConfig(hidden=H, num_experts=8, top_k=2, aux_coef=0.1, seq_aux_coef=0.1, z_coef=0.1)
    router = build(config)
    idx, weights, losses = router(torch.randn(0, H))
    assert idx.shape == weights.shape == (0, 2) and all(v.item() == 0 for v in losses.values())
    x = torch.randn(2, 5, H)
    idx, weights, losses = router(x, torch.zeros(2, 5, dtype=torch.bool))
    assert (idx == -1).all() and (weights == 0).all() and all(v.item() == 0 for v in losses.values())


def test_fp32_inside_under_bf16_and_autocast() -> None:
    config = RouterConfig.preset("deepseek_v3", hidden=H, num_experts=64, seq_aux_coef=1.0)
    router = build(config)
    x = torch.randn(30, H).bfloat16()
    want = router(x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = router(x)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]) and got[2] == want[2]
    bias = router.expert_bias.clone()
    router.to(torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16
    assert router.expert_bias.dtype == torch.float32 and torch.equal(router.expert_bias, bias)
    assert router(x)[1].dtype == torch.float32


def test_load_counts_in_training_only_and_stays_out_of_checkpoints() -> None:
    router = build(RouterConfig(hidden=H, num_experts=8, top_k=2, aux_free=True)).eval()
    router(torch.randn(5, H))
    assert router.load.sum() == 0
    router.train()(torch.randn(5, H))
    assert router.load.sum() == 10
    assert sorted(router.state_dict()) == ["expert_bias", "weight"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"top_k": 9}, "top_k must be at most the experts left by grouping"),
        ({"num_groups": 3}, r"num_experts \(8\) must be divisible by num_groups \(3\)"),
        ({"num_groups": 4, "top_groups": 5}, "top_groups must be at most num_groups"),
        ({"num_groups": 4, "group_top": 3}, "group_top must be at most the group's size"),
        ({"score": "tanh"}, "score must be one of softmax, sigmoid, got 'tanh'"),
        ({"top_k": 0}, "top_k must be an integer of at least 1, got 0"),
        ({"z_coef": float("nan")}, "z_coef must be at least 0, got nan"),
    ],
)
def test_bad_configurations_are_refused_in_a_sentence(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(RouterConfig(hidden=H, num_experts=8, top_k=2), **changes)  # type: ignore[arg-type]


def test_bad_calls_are_refused_in_a_sentence() -> None:
    router = build(RouterConfig(hidden=H, num_experts=8, top_k=2))
    with pytest.raises(ValueError, match="router preset must be one of"):
        RouterConfig.preset("gpt5", hidden=H)
    with pytest.raises(ValueError, match=r"x must be \[..., S, 16\]"):
        router(torch.randn(4, H + 1))
    with pytest.raises(ValueError, match=r"token_mask must be \(4,\) torch.bool, got \(3,\)"):
        router(torch.randn(4, H), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="update_bias needs a router with aux_free=True"):
        router.update_bias()


SHARED = RouterConfig(
    hidden=H, num_experts=8, top_k=2, score="sigmoid", aux_free=True, aux_coef=0.3, seq_aux_coef=0.2, z_coef=0.1
)


def _losses_of(router: Router, x: torch.Tensor) -> dict[str, torch.Tensor]:
    losses = router(x)[2]
    sum(losses.values()).backward()
    router.update_bias()
    return {name: loss.detach() for name, loss in losses.items()}


def _one_rank(rank, world_size, group):
    torch.manual_seed(0)
    router = Router(SHARED, group=group)
    x = torch.randn(4, 5, H, generator=torch.Generator().manual_seed(1))
    losses = _losses_of(router, (x[:1], x[1:], x[:0])[rank])  # 5, 15 and 0 tokens
    return losses, router.weight.grad, router.expert_bias


def test_ranks_with_uneven_tokens_have_the_losses_of_one(ranks):
    torch.manual_seed(0)
    router = Router(SHARED)
    want = _losses_of(router, torch.randn(4, 5, H, generator=torch.Generator().manual_seed(1)))
    results = ranks(3).run(_one_rank)
    for name, loss in want.items():
        torch.testing.assert_close(sum(r[0][name] for r in results) / 3, loss)
    torch.testing.assert_close(sum(r[1] for r in results) / 3, router.weight.grad)
    assert all(torch.equal(r[2], router.expert_bias) for r in results)
