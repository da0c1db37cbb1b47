"""What the ranks of test_megatron*.py run; imported in them only, since it imports megatron-core."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import multiprocessing
import queue
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from megamoe.adapters.megatron import gpt
from megamoe.adapters.megatron.on_cpu import emulated_cuda
from megamoe.adapters.megatron.options import Options
from megamoe.adapters.megatron.train import run
from megamoe.lm.world import from_group
from tests.lm_case import corpus

TINY = Options(steps=20, hidden=32, intermediate=24, heads=2, length=16, batch=8, micro_batch=2, device="cpu")


@contextlib.contextmanager
def megatron(options: Options, *, ep: int) -> Iterator[None]:
    """Process groups and emulation for one piece of a test."""
    gc.collect()  # models are cycles, and those of the piece before hold groups, whose threads add up
    with emulated_cuda(), warnings.catch_warnings(), gpt.model_parallel(options, ep=ep):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            gpt.moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale = None  # outlives models, and has two shapes


def train(rank, world_size, group, options):
    """Losses and gradient norms of each step; the same on all ranks."""
    gc.collect()  # see megatron()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figures = run(options, from_group(device="cpu"), corpus())
    return figures.losses, figures.grad_norms


def config_for(options: Options, *, ep: int, **fields: Any) -> TransformerConfig:
    return gpt.make_config(options, torch.float32, ep=ep, **fields)


def moe_spec(options: Options, config: TransformerConfig) -> Any:
    return gpt.make_spec(options, config).submodules.mlp


def build_layer(options: Options, config: TransformerConfig) -> MoELayer:
    """One MoE layer alone, stock or ours; from the same seed with the same weights."""
    gpt.seed_everything(options)
    spec = moe_spec(options, config)
    groups = gpt.moe_utils.get_default_pg_collection()
    if isinstance(spec, functools.partial):  # 0.19
        layer = spec(config=config, pg_collection=groups, is_mtp_layer=False)
    else:
        layer = build_module(spec, config=config, pg_collection=groups)
    layer.set_layer_number(1)
    return layer


def expert_weights(layer: MoELayer, *, grad: bool = False) -> dict[str, torch.Tensor]:
    """This rank's experts as ``fc1`` [S, 2I, H] and ``fc2`` [S, H, I]; their gradients, ``main_grad`` where it is."""

    def value(p: torch.Tensor) -> torch.Tensor:
        if not grad:
            return p.detach().clone()
        return p.main_grad.clone() if hasattr(p, "main_grad") else p.grad.clone()

    if hasattr(layer.experts, "w13"):
        return {"fc1": value(layer.experts.w13), "fc2": value(layer.experts.w2)}
    experts = layer.experts.local_experts
    return {
        "fc1": torch.stack([value(e.linear_fc1.weight) for e in experts]),
        "fc2": torch.stack([value(e.linear_fc2.weight) for e in experts]),
    }


def layer_pass(layer: MoELayer, config: TransformerConfig, rank: int, *, tokens: int, mask: bool = False) -> Any:
    """Output and all gradients of one forward and backward."""
    generator = torch.Generator().manual_seed(100 + rank)
    x = torch.randn(tokens, 2, config.hidden_size, generator=generator, requires_grad=True)
    grad_y = torch.randn(x.shape, generator=generator)
    padding = torch.zeros(2, tokens, dtype=torch.bool)
    if mask:
        padding[:, tokens // 2 :] = True
    y, bias = layer(x, padding_mask=padding if mask else None)
    assert bias is None
    y.backward(grad_y)
    result = {"y": y.detach(), "dx": x.grad, "router": layer.router.weight.grad, **expert_weights(layer, grad=True)}
    if layer.shared_experts is not None:
        result["shared"] = layer.shared_experts.linear_fc1.weight.grad
    return result


def compare_layers(rank, world_size, group, fields, ep, mask):  # noqa: PLR0917
    """[largest absolute difference over largest value] of everything a pass gives, stock against ours."""
    results = []
    with megatron(TINY, ep=ep):
        for moe in ("stock", "megamoe"):
            options = dataclasses.replace(TINY, moe=moe)
            config = config_for(options, ep=ep, **fields)
            layer = build_layer(options, config)
            layer.train()
            results.append(layer_pass(layer, config, rank, tokens=5 + 2 * rank, mask=mask))
    want, got = results
    assert want.keys() == got.keys()
    return {k: float((got[k] - want[k]).abs().max() / want[k].abs().max().clamp(min=1e-12)) for k in want}


def start_and_marks(rank, world_size, group, ep):
    """(whether ours starts with the stock weights, attributes of ours, attributes of the stock ones)."""
    names = ("allreduce", "tensor_model_parallel", "requires_grad")
    with megatron(TINY, ep=ep):
        stock, ours = (build_layer(o, config_for(o, ep=ep)) for o in (dataclasses.replace(TINY, moe="stock"), TINY))
        want, got = expert_weights(stock), expert_weights(ours)
        equal = all(torch.equal(want[k], got[k]) for k in want)
        of_stock = [{n: getattr(p, n) for n in names} for p in stock.experts.parameters()]
        of_ours = [{n: getattr(p, n) for n in names} for p in ours.experts.parameters()]
        routers = torch.equal(stock.router.weight, ours.router.weight)
    return equal and routers, of_ours, of_stock


def in_ddp(layer: MoELayer, config: TransformerConfig, *, delay: bool = False) -> DistributedDataParallel:
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    settings.delay_wgrad_compute = delay
    return DistributedDataParallel(config, settings, layer)


def main_grads(rank, world_size, group, ways, engine):
    """Weight gradients in ``main_grad`` after two passes: plain, and in each of ``ways`` of keeping them.

    Ways: "fused", "delayed" (backward_dw by hand), "delayed fused", "dispatch" (0.19's own call of backward_dw).
    Returns a list of (gradients, whether any were there before backward_dw), plain first.
    """
    options = dataclasses.replace(TINY, engine=engine)
    results = []
    with megatron(options, ep=2):
        for way in ("", *ways):
            config = config_for(options, ep=2, gradient_accumulation_fusion="fused" in way)
            delay = way.startswith("delayed")
            config.delay_wgrad_compute = delay
            if way == "dispatch":
                config.overlap_dispatch_backward_with_experts_wgrad = True
            layer = build_layer(options, config)
            model = in_ddp(layer, config, delay=delay)
            model.zero_grad_buffer()
            for _ in range(2):
                layer_pass(layer, config, rank, tokens=6)
            before = any(bool(p.main_grad.any()) for p in layer.experts.parameters())
            if delay:
                layer.backward_dw()
            assert all(p.grad is None for p in layer.experts.parameters())
            assert not layer.experts.waiting
            results.append((expert_weights(layer, grad=True), before))
            del model
    return results


def cross_load(rank, world_size, group, folder, distributed, first):  # noqa: PLR0917
    """Train with ``first`` at EP 2; the other layer reads the checkpoint, writes its own, and ``first`` reads that.

    The readers run at EP 4 with the optimiser's state, at EP 1 with the weights alone. After checking that weights are
    the writer's bit for bit, and so is all that stands in the files, returns the next losses of both layers.
    """
    multiprocessing.current_process()._config["daemon"] = False  # a pool's ranks are; 0.16 writes in processes
    filesystem_async._results_queue = queue.Queue()  # else it starts a process that outlives this one
    other = {"stock": "megamoe", "megamoe": "stock"}[first]
    written = Path(folder) / "first"
    base = dataclasses.replace(TINY, steps=3, warmup=0, distributed_optimizer=distributed, micro_batch=1)
    run(dataclasses.replace(base, moe=first, ep=2, save=str(written)), from_group(device="cpu"), corpus())
    losses = []
    for ep in (4, 1):
        with megatron(base, ep=ep):
            want = _read(dataclasses.replace(base, moe=first), ep, written)
            rewritten = Path(folder) / str(ep)
            assert _same(want, _read(dataclasses.replace(base, moe=other), ep, written, rewritten))
            assert _same(want, _read(dataclasses.replace(base, moe=first), ep, rewritten))
            files = [_tensors(folder, optimizer=ep > 1) for folder in (written, rewritten)]
            assert len(files[0]) >= (30 if ep > 1 else 10)
            assert _same(*files)
        if ep > 1:  # moments travel too: without them the next steps would differ
            for moe in (first, other):
                options = dataclasses.replace(base, moe=moe, ep=ep, load=str(written))
                losses.append(train(rank, world_size, group, options)[0])
    return losses


def _read(options: Options, ep: int, source: Path, target: Path | None = None) -> dict[str, torch.Tensor]:
    """Parameters of a new model that read ``source``, and then perhaps wrote ``target``."""
    config = config_for(options, ep=ep)
    model = gpt.make_model(options, config, torch.device("cpu"))
    optimizer = gpt.make_optimizer(options, config, model) if ep > 1 else None
    with torch.no_grad():
        for p in model.module.parameters():
            p.fill_(7.0)
    gpt.load(source, model, optimizer)
    result = {n: p.detach().clone() for n, p in model.module.named_parameters() if ".mlp.experts." not in n}
    for n, block in enumerate(model.module.decoder.layers):
        result |= {f"{n}.{k}": v for k, v in expert_weights(block.mlp).items()}
    assert all(float(v.std()) > 0 for v in result.values())
    if target is not None:
        gpt.save(target, model, optimizer)
    return result


def _tensors(folder: Path, *, optimizer: bool) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint holds, whole; without what belongs to the optimiser unless ``optimizer``."""
    found = dist_checkpointing.load_plain_tensors(str(folder))
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, torch.Tensor) and (optimizer or not name.startswith("optimizer"))
    }


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def local_states(rank, world_size, group):
    """State dicts between the layers, in both stock forms; whether all was equal."""
    with megatron(TINY, ep=2):
        stock_options = dataclasses.replace(TINY, moe="stock")
        config = config_for(TINY, ep=2)
        stock, ours = build_layer(stock_options, config), build_layer(TINY, config)
        want = expert_weights(stock)
        other = build_layer(dataclasses.replace(TINY, seed=5), config_for(TINY, ep=2))
        with torch.no_grad():
            for p in other.experts.parameters():
                p.add_(1.0)
        other.load_state_dict(stock.state_dict())  # strict
        assert _same(want, expert_weights(other))
        stock.load_state_dict(ours.state_dict())  # strict
        assert _same(expert_weights(ours), expert_weights(stock))

        ours.experts.grouped_keys = True
        grouped = ours.state_dict()
        S = ours.num_local_experts
        for i in range(S):
            assert torch.equal(grouped[f"experts.linear_fc1.weight{i}"], expert_weights(ours)["fc1"][i])
            assert torch.equal(grouped[f"experts.linear_fc2.weight{i}"], expert_weights(ours)["fc2"][i])
        with torch.no_grad():
            for p in other.experts.parameters():
                p.add_(1.0)
        other.load_state_dict(grouped)
        assert _same(expert_weights(ours), expert_weights(other))

        refused = {}
        broken = dict(stock.state_dict())
        del broken["experts.local_experts.0.linear_fc1.weight"]
        broken["experts.local_experts.0.linear_fc1.bias"] = torch.zeros(3)
        broken["experts.local_experts.1.linear_fc2.weight"] = torch.zeros(3, 3)
        try:
            other.load_state_dict(broken)
        except RuntimeError as error:
            refused = {"error": str(error)}
    return refused


def sharded_keys(rank, world_size, group, metadata):
    """Every tensor and object of the experts' sharded state: key, global shape, offset, replica; stock and ours."""
    found = []
    with megatron(TINY, ep=2):
        for moe in ("stock", "megamoe"):
            options = dataclasses.replace(TINY, moe=moe)
            layer = build_layer(options, config_for(options, ep=2))
            groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
            state = layer.sharded_state_dict(
                prefix="layers.mlp.", sharded_offsets=((0, 1, 4),), metadata={**metadata, **groups}
            )
            apply_factories(state)
            flat = [t for v in state.values() for t in (v if isinstance(v, list) else [v])]
            found.append(
                sorted(
                    (t.key, tuple(t.global_shape), tuple(t.global_offset), t.replica_id, str(getattr(t, "dtype", "")))
                    for t in flat
                )
            )
    return found
