"""Every family's experts through megamoe in one process: eager's logits and gradients, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers; .ci/client_transformers runs these tests")

from megamoe.activation import Activation
from megamoe.adapters import transformers as megamoe_hf
from megamoe.adapters.transformers.experts import run_experts
from megamoe.adapters.transformers.forms import form_of, is_experts
from megamoe.testing.numerics import assert_close, difference
from tests.adapters import hf_case as case

ALONE = {"settings": megamoe_hf.Settings(), "group": None}


@pytest.fixture(autouse=True)
def registered() -> None:
    megamoe_hf.register()


def experts_of(model: torch.nn.Module) -> Any:
    return next(m for m in model.modules() if is_experts(m))


@pytest.mark.parametrize("family", case.FAMILIES)
def test_logits_and_gradients_are_eagers(family: str) -> None:
    """fp32: only the order of sums differs."""
    model = case.model(family)
    assert set(megamoe_hf.explain(model).values()) == {None} and len(megamoe_hf.explain(model)) == 2
    ids = case.tokens(3, 7)
    expected, grads = case.logits_and_grads(model, ids)
    model.set_experts_implementation("megamoe")
    logits, ours = case.logits_and_grads(model, ids)
    assert_close(logits, expected, whole=1e-11, row=1e-10, what="logits")
    assert set(ours) == set(grads) and any(".experts." in name for name in ours)
    for name, grad in grads.items():
        assert difference(ours[name], grad) < 1e-10, name
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, logits)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_bf16_is_within_the_recipes_error(family: str) -> None:
    """One module, so that no router downstream can fall over: against fp32 eager over the same bf16 numbers."""
    exact = experts_of(case.model(family))
    exact.to(torch.bfloat16).float()
    rounded = copy.deepcopy(exact).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(40, 32, generator=generator).bfloat16()
    index = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(40)])
    weights = torch.rand(40, 2, generator=generator).bfloat16()
    grad = torch.randn(40, 32, generator=generator).bfloat16()
    results = []
    for module, dtype in ((exact, torch.float32), (rounded, torch.bfloat16)):
        inputs = [x.to(dtype).requires_grad_(), weights.to(dtype).requires_grad_()]
        call = type(module).forward.__wrapped__ if dtype == torch.float32 else run_experts
        y = call(module, inputs[0], index, inputs[1], **(ALONE if dtype == torch.bfloat16 else {}))
        assert y.dtype == dtype
        y.backward(grad.to(dtype))
        results.append([y, inputs[0].grad, inputs[1].grad, *(p.grad for p in module.parameters())])
    names = ["y", "dx", "dweights", *(name for name, _ in exact.named_parameters())]
    for name, expected, got in zip(names, *results, strict=True):
        if name in ("y", "dx"):
            assert_close(got.float(), expected, whole=1e-5, row=1e-4, what=name)
        # A top-k weight's gradient is one dot product and may cancel; a column of a matrix may have met few tokens.
        assert difference(got, expected) < 2e-5, name


def test_gpt_oss_reaches_its_clamps() -> None:
    module = experts_of(case.model("gpt_oss"))
    form = form_of(module)
    assert form.activation == Activation("swiglu_clamped", limit=7.0, alpha=1.702)
    assert form.layout == megamoe_hf.Layout(transposed=True, interleaved=True)
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(4))
    h = torch.einsum("th,ehi->eti", x, module.gate_up_proj) + module.gate_up_proj_bias[:, None]
    assert h[..., ::2].max() > 7 and h[..., 1::2].abs().max() > 7


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_sentinels_are_not_read(family: str) -> None:
    """The number of experts as an id, with weight 0, is transformers' mark for a route that is not this rank's."""
    module = experts_of(case.model(family))
    x, weights = torch.randn(5, 32), torch.rand(5, 2)
    index = torch.tensor([[0, 1], [4, 1], [2, 4], [4, 4], [3, 2]])
    here = index < 4
    with torch.no_grad():
        y = run_experts(module, x, index, weights * here, **ALONE)
        whole = run_experts(module, x, index.clamp(max=3), weights * here, **ALONE)
        assert_close(y, whole, whole=1e-12, row=1e-12)
        assert not y[3].any() and y[0].any()


def test_no_tokens() -> None:
    module = experts_of(case.model("qwen3_moe"))
    x = torch.zeros(0, 32, requires_grad=True)
    y = run_experts(module, x, torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2), **ALONE)
    assert y.shape == (0, 32)
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


def test_optimiser_steps_are_seen_between_evaluations() -> None:
    model = case.model("gpt_oss", experts="megamoe")
    ids = case.tokens(2, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with torch.no_grad():
        before = model(input_ids=ids).logits
    for _ in range(2):
        case.logits_and_grads(model, ids)
        optimizer.step()
    with torch.no_grad():
        after = model(input_ids=ids).logits
        model.set_experts_implementation("eager")
        expected = model(input_ids=ids).logits
    assert difference(before, after) > 1e-4
    assert_close(after, expected, whole=1e-11, row=1e-10)


def test_a_copy_is_on_its_own() -> None:
    model = case.model("gpt_oss", experts="megamoe")
    ids = case.tokens(2, 6)
    with torch.no_grad():
        first = model(input_ids=ids).logits
        other = copy.deepcopy(model)
        experts_of(other).down_proj.zero_()
        assert difference(other(input_ids=ids).logits, first) > 1e-6
        assert torch.equal(model(input_ids=ids).logits, first)


def test_what_else_is_computed_is_refused() -> None:
    model = case.model("exact_gelu")
    (reason,) = set(megamoe_hf.explain(model).values())
    known = "swiglu, geglu, swiglu_limited, swiglu_clamped"
    assert reason == f"megamoe can't run Qwen3MoeExperts: its activation is none of {known}"
    model.set_experts_implementation("megamoe")
    with pytest.raises(ValueError, match="its activation is none of"):
        model(input_ids=case.tokens(1, 3))


def _normalised(module: Any) -> None:
    module.has_post_expert_norm = True


def _halved(module: Any) -> None:
    module.half()


def _scaled(module: Any) -> None:
    module.gate_up_proj_scale_inv = torch.nn.Parameter(torch.ones(4))


def _odd(module: Any) -> None:
    module.gate_up_proj = torch.nn.Parameter(torch.zeros(4, 2 * 12, 32))
    module.down_proj = torch.nn.Parameter(torch.zeros(4, 32, 12))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_normalised, "normalises each expert's result"),
        (_halved, "must be float32 or bfloat16, got torch.float16"),
        (_scaled, "expected the parameters gate_up_proj, down_proj, got"),
        (_odd, "multiples of 8, got 32 and 12"),
    ],
)
def test_modules_that_do_not_fit_are_refused(change: Any, says: str) -> None:
    module = experts_of(case.model("mixtral"))
    change(module)
    with pytest.raises(ValueError, match=says):
        form_of(module)


def test_deepseek_v4s_experts_alone() -> None:
    """Of a model that needs more than experts to be tiny; pre-activations on both sides of its bound."""
    module_of = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    sizes = dict(hidden_size=32, moe_intermediate_size=24, n_routed_experts=4, num_experts_per_tok=2, swiglu_limit=0.75)
    config = module_of.DeepseekV4Config(**sizes)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    module = module_of.DeepseekV4Experts(config)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.3)
    assert form_of(module).activation == Activation("swiglu_limited", limit=0.75)
    x = torch.randn(20, 32, requires_grad=True)
    index, weights = torch.rand(20, 4).topk(2).indices, torch.rand(20, 2)
    expected = module(x, index, weights)
    got = run_experts(module, x, index, weights, settings=megamoe_hf.Settings(), group=None)
    assert_close(got, expected, whole=1e-10, row=1e-9, what="y")
    grads = [torch.autograd.grad(y.square().sum(), [x, *module.parameters()]) for y in (got, expected)]
    for ours, theirs in zip(*grads, strict=True):
        assert difference(ours, theirs) < 1e-9


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="recipe must be auto or one of fp32"):
        megamoe_hf.register(recipe="int3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is not one"):
        form_of(torch.nn.Linear(8, 8))
