"""The plug-in for vLLM against vLLM's own modular kernel and method, from its published wheel, on a CPU."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="needs vllm; .ci/client_vllm runs these tests")

from megamoe.testing.numerics import assert_close
from megamoe.testing.ranks import RankPool
from tests.adapters import vllm_case as case
from tests.repo import ROOT

case.on_cpu()

import vllm.model_executor.layers.fused_moe.modular_kernel as mk  # noqa: E402
from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.model_executor.custom_op import op_registry_oot  # noqa: E402
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig  # noqa: E402
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod  # noqa: E402

from megamoe.adapters import vllm as adapter  # noqa: E402

BOUNDS = {"whole": 2e-5, "row": 2e-4}  # of bf16 between the GEMMs and in y
KINDS = ("silu", "silu within bounds", "gelu_tanh", "swigluoai_uninterleave")


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    with set_current_vllm_config(VllmConfig()):
        yield
    op_registry_oot.pop("UnquantizedFusedMoEMethod", None)


class Layer(torch.nn.Module):
    """What ``UnquantizedFusedMoEMethod`` reads of vLLM's RoutedExperts."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.moe_config = config
        self.activation = config.activation
        self.global_num_experts = config.num_experts
        self.apply_router_weight_on_input = False
        self.expert_map = None
        self.swiglu_alpha, self.swiglu_beta = config.swiglu_alpha, config.swiglu_beta
        self.swiglu_limit = config.swiglu_limit

    def _expert_routing_tables(self) -> None:
        return None


@pytest.mark.parametrize("kind", KINDS)
def test_vllms_method_runs_through_mega_moe(kind: str) -> None:
    """Built, loaded, processed and applied as vLLM does it."""
    adapter.register()
    adapter.register()
    config = case.config(kind)
    method = UnquantizedFusedMoEMethod(config)
    assert type(method) is adapter.MegaMoEMethod and method.experts_cls is adapter.MegaMoEExperts
    assert method.maybe_roundup_sizes(case.H, case.I, torch.bfloat16, config.moe_parallel_config) == (case.H, case.I)
    layer = Layer(config)
    method.create_weights(layer, case.E, case.H, case.I, torch.bfloat16)
    values = case.weights(kind)
    assert {name for name, _ in layer.named_parameters()} == set(values)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(values[name])
    method.process_weights_after_loading(layer)
    assert method.moe_kernel.output_is_reduced() and not method.moe_kernel.supports_deferred_moe_finalize()
    x, gates, ids = case.routed(11, 0)
    kept = x.clone()
    y = method.apply(layer, x, gates, ids, None, None)
    assert y.dtype == torch.bfloat16 and torch.equal(x, kept)
    assert_close(y, case.formula(kind, values, x, gates, ids), **BOUNDS)
    ids[3], ids[4, 0] = -1, -1
    y = method.apply(layer, x, gates, ids, None, None)
    assert not y[3].any()
    only = gates.clone()
    only[3], only[4, 0] = 0, 0
    assert_close(y, case.formula(kind, values, x, only, ids.clamp(min=0)), **BOUNDS)


def _on_rank(rank: int, world_size: int, group: Any, mode: str) -> None:
    case.on_cpu()
    import vllm.model_executor.layers.fused_moe.modular_kernel as mk
    from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig

    from megamoe.adapters import vllm as adapter

    parallel = {"use_ep": True, "ep_size": world_size, "ep_rank": rank}
    if mode == "data":
        parallel |= {"dp_size": world_size, "dp_rank": rank}
    if mode == "columns":
        parallel = {"tp_size": world_size, "tp_rank": rank}
    config = case.config(ranks=1 if mode == "columns" else world_size, **parallel)
    supported = adapter.MegaMoEExperts.is_supported_config(
        adapter.MegaMoEExperts, config, None, None, mk.FusedMoEActivationFormat.Standard
    )
    assert supported == (True, None)
    experts = adapter.MegaMoEExperts(config, FusedMoEQuantConfig.make())
    if mode != "columns":
        experts.group = group
    kernel = mk.FusedMoEKernel(adapter.MegaMoEPrepareAndFinalize(config.moe_parallel_config), experts)
    local = case.E // world_size
    expert_map = torch.full((case.E,), -1, dtype=torch.int32)
    expert_map[rank * local : (rank + 1) * local] = torch.arange(local, dtype=torch.int32)
    layer = torch.nn.Module()
    layer.expert_map = expert_map
    experts.process_weights_after_loading(layer)

    w = case.weights()
    x, gates, ids = case.routed(5 + rank, rank) if mode == "data" else case.routed(9, 0)
    mine = slice(rank * local, (rank + 1) * local)
    w13, w2 = w["w13_weight"][mine], w["w2_weight"][mine]
    if mode == "columns":
        width = case.I // world_size
        part = slice(rank * width, (rank + 1) * width)
        w13 = torch.cat([half[:, part] for half in w["w13_weight"].chunk(2, dim=1)], dim=1)
        w2 = w["w2_weight"][:, :, part].contiguous()
    y = kernel.apply(
        x,
        w13,
        w2,
        gates,
        ids,
        config.activation,
        global_num_experts=case.E,
        expert_map=None if mode == "columns" else expert_map,
        apply_router_weight_on_input=False,
    )
    assert kernel.output_is_reduced() is (mode == "data")
    if mode == "tokens":
        assert (y == 0).all(1).sum() == 9 - len(range(rank, 9, world_size)), "each rank answers for its own tokens"
    if mode != "data":  # what vLLM's runner does with an output that is not reduced
        y = y.float()
        torch.distributed.all_reduce(y, group=group)
    assert_close(y, case.formula("silu", w, x, gates, ids), **BOUNDS)
    if mode == "columns":
        return
    layer.expert_map = expert_map.roll(1)
    try:
        experts.process_weights_after_loading(layer)
    except ValueError as error:
        assert "linear expert placement" in str(error)
    else:
        raise AssertionError("another placement went unnoticed")


@pytest.mark.parametrize("mode", ["data", "tokens", "columns"])
def test_over_ranks(ranks: Callable[[int], RankPool], mode: str) -> None:
    """Expert-parallel ranks with tokens of their own, or all with the same; tensor-parallel ones that share experts."""
    ranks(2).run(_on_rank, mode, timeout_s=300)


def test_what_it_cannot_run_keeps_vllms_kernel() -> None:
    for changes in (
        {"enable_eplb": True},
        {"use_ep": True, "dp_size": 2, "all2all_backend": "deepep_low_latency"},
        {"dp_size": 2, "tp_size": 2},
    ):
        supported, why = _supports(case.config(**changes))
        assert not supported and "parallel config" in str(why)
    adapter.register()
    config = case.config("gelu_tanh")
    config.swiglu_limit = 7.0
    method = UnquantizedFusedMoEMethod(config)
    assert type(method) is adapter.MegaMoEMethod
    assert method.experts_cls.__module__.startswith("vllm.")


def _supports(config: Any) -> tuple[bool, str | None]:
    return adapter.MegaMoEExperts.is_supported_config(
        adapter.MegaMoEExperts, config, None, None, mk.FusedMoEActivationFormat.Standard
    )


def test_refusals_are_sentences() -> None:
    config = case.config("gelu_tanh")
    config.swiglu_limit = 7.0
    assert _supports(config) == (
        False,
        "megamoe has no MoEActivation.GELU_TANH with limit, alpha, beta = (7.0, None, None)",
    )
    config = case.config("swigluoai_uninterleave")
    config.swiglu_beta = 0.0
    assert "megamoe has no MoEActivation.SWIGLUOAI_UNINTERLEAVE" in str(_supports(config)[1])
    config = case.config("swigluoai")
    assert "swigluoai" in str(_supports(config)[1]).lower()
    config = case.config("swigluoai_uninterleave", tp_size=2)
    assert "would add biases on each of the tensor-parallel ranks" in str(_supports(config)[1])
    config = case.config()
    config.in_dtype = torch.float16
    assert _supports(config)[1] == "megamoe takes bfloat16 activations, got torch.float16"
    config = case.config()
    config.hidden_dim = 60
    assert "hidden must be a multiple of 8" in str(_supports(config)[1])
    experts = adapter.MegaMoEExperts(case.config(), FusedMoEQuantConfig.make())
    x, gates, ids = case.routed(2, 0)
    w = case.weights()
    empty = torch.empty(0)
    with pytest.raises(ValueError, match="got apply_router_weight_on_input=True"):
        experts.apply(
            torch.empty_like(x), x, w["w13_weight"], w["w2_weight"], gates, ids, case.config().activation, case.E,
            None, None, None, empty, empty, None, True,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (adapter.MegaMoEExperts, mk.FusedMoEExpertsModular),
        (adapter.MegaMoEPrepareAndFinalize, mk.FusedMoEPrepareAndFinalizeModular),
        (adapter.MegaMoEMethod, UnquantizedFusedMoEMethod),
    ],
)
def test_methods_take_what_vllm_passes(ours: type, theirs: type) -> None:
    """Every method that replaces one of vLLM's has its parameters, in its order; nothing abstract is left."""
    assert not inspect.isabstract(ours)
    replaced = [name for name in vars(ours) if callable(getattr(theirs, name, None)) and not name.startswith("__")]
    assert ours is adapter.MegaMoEMethod or replaced
    for name in replaced:
        mine, original = (list(inspect.signature(getattr(c, name)).parameters) for c in (ours, theirs))
        assert mine == original, name


def test_plugin_waits_for_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGAMOE_VLLM", raising=False)
    adapter.plugin()
    assert "UnquantizedFusedMoEMethod" not in op_registry_oot
    monkeypatch.setenv("MEGAMOE_VLLM", "1")
    adapter.plugin()
    assert op_registry_oot["UnquantizedFusedMoEMethod"] is adapter.MegaMoEMethod
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"megamoe": "megamoe.adapters.vllm:plugin"}


def test_the_pages_example(tmp_path: Path) -> None:
    page = (ROOT / "docs/vllm.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"<!-- example -->\n```python\n(.*?)```", page, flags=re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(code, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False, timeout=250
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "(4, 64) through MegaMoEExperts" in done.stdout
