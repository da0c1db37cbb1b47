"""The experts' names in Megatron-Core's checkpoints, so that either layer reads what the other wrote.

| where | fc1 [2I, H]; fc2 [H, I] likewise |
|---|---|
| state dict of ``SequentialMLP`` | ``local_experts.{i}.linear_fc1.weight`` |
| state dict of ``TEGroupedMLP`` | ``linear_fc1.weight{i}`` |
| sharded, both | ``experts.linear_fc1.weight``, global (E, 2I, H), gate and up cut apart |
| sharded, ``singleton_local_shards`` | ``experts.{e}.linear_fc1.weight_w`` (gate) and ``_v`` (up); fc2: ``.weight`` |

i counts this rank's experts, e all. A loaded sharded checkpoint comes back stacked: ``linear_fc1.weight`` [S, 2I, H].
``_extra_state`` entries hold nothing (None); they are written because the stock layers ask for them.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint

LINEARS = ("linear_fc1", "linear_fc2")


def _weights(experts: Any) -> dict[str, torch.nn.Parameter]:
    return dict(zip(LINEARS, (experts.w13, experts.w2), strict=True))


def _sequential_key(linear: str, i: int) -> str:
    return f"local_experts.{i}.{linear}.weight"


def _grouped_key(linear: str, i: int) -> str:
    return f"{linear}.weight{i}"


def local_state(experts: Any, prefix: str, keep_vars: bool) -> dict[str, Any]:
    """Entries of ``experts``' state dict: views of its parameters under the stock keys."""
    state: dict[str, Any] = {}
    for linear, weight in _weights(experts).items():
        whole = weight if keep_vars else weight.detach()
        for i in range(experts.num_local_experts):
            key = _grouped_key(linear, i) if experts.grouped_keys else _sequential_key(linear, i)
            state[prefix + key] = whole[i]
            if not experts.grouped_keys:
                state[f"{prefix}local_experts.{i}.{linear}._extra_state"] = None
        if experts.grouped_keys:
            state[f"{prefix}{linear}._extra_state"] = None
    return state


@torch.no_grad()
def load_local_state(experts: Any, state: dict[str, Any], prefix: str) -> tuple[list[str], list[str], list[str]]:
    """Copy what ``state`` holds under ``prefix`` into the parameters, in any of the forms of the module's text.

    Returns:
        (missing keys, unexpected keys, errors): errors are sentences about shapes.
    """
    missing, errors = [], []
    read = set()
    for linear, weight in _weights(experts).items():
        stacked = prefix + f"{linear}.weight"
        targets: list[tuple[tuple[str, ...], torch.Tensor]] = [((stacked,), weight)]
        if stacked not in state:
            targets = [
                ((prefix + _sequential_key(linear, i), prefix + _grouped_key(linear, i)), weight[i])
                for i in range(experts.num_local_experts)
            ]
        for keys, target in targets:
            key = next((k for k in keys if k in state), None)
            if key is None:
                missing.append(keys[bool(experts.grouped_keys)])
                continue
            read.add(key)
            if state[key].shape != target.shape:
                got, want = tuple(state[key].shape), tuple(target.shape)
                errors.append(f"{key} must have shape {want}, got {got}: other sizes, or another number of EP ranks")
                continue
            target.copy_(state[key])
    under = [key for key in state if key.startswith(prefix)]
    unexpected = [key for key in under if key not in read and "_extra_state" not in key.rsplit(".", 1)[-1]]
    return missing, unexpected, errors


def sharded_state(experts: Any, prefix: str, offsets: tuple[Any, ...], *, singleton: bool) -> dict[str, Any]:
    """Factories that cut each stacked parameter, and whatever an optimiser keeps of its shape, into stock pieces."""
    state: dict[str, Any] = {}
    first, num_experts = experts.first_expert, experts.problem.num_experts
    replica_id = (0, 0, experts.replica_rank)
    for linear, weight in _weights(experts).items():
        state[f"{prefix}{linear}.weight"] = _factory(experts, linear, weight, prefix, offsets, singleton, replica_id)
        for i in range(experts.num_local_experts):
            expert = first + i
            key = f"{prefix}experts.{f'{expert}.' if singleton else ''}{linear}._extra_state"
            place = offsets if singleton else (*offsets, (len(offsets), expert, num_experts))
            state[f"{prefix}local_experts.{i}.{linear}._extra_state"] = make_sharded_object_for_checkpoint(
                None, key, place, replica_id
            )
    return state


def _factory(  # noqa: PLR0917
    experts: Any,
    linear: str,
    weight: torch.nn.Parameter,
    prefix: str,
    offsets: tuple[Any, ...],
    singleton: bool,
    replica_id: tuple[int, int, int],
) -> ShardedTensorFactory:
    first, num_experts = experts.first_expert, experts.problem.num_experts
    parts = 2 if linear == "linear_fc1" else 1  # gate and up are apart, so that tensor-parallel readers can cut each

    @torch.no_grad()
    def build(key: str, whole: torch.Tensor, replica_id: Any, flattened_range: slice | None) -> list[ShardedTensor]:
        if flattened_range is not None:
            raise ValueError(
                "the experts' optimiser state can't be saved in flattened pieces: "
                'set distrib_optim_sharding_type to "fully_reshardable" or "dp_reshardable"'
            )
        pieces = []
        for i, expert in enumerate(range(first, first + len(whole))):
            if singleton:
                own, depth = offsets, len(offsets)
                name = key.replace(f"{prefix}experts.", f"{prefix}experts.{expert}.")
            else:
                own, depth, name = (*offsets, (len(offsets), expert, num_experts)), len(offsets) + 1, key
            for part, piece in enumerate(whole[i].chunk(parts)):
                suffix = ("_w", "_v")[part] if singleton and parts == 2 else ""
                cut = ((depth, part, parts),) if parts > 1 and not singleton else ()
                pieces.append(
                    ShardedTensor.from_rank_offsets(
                        name + suffix, piece, *own, *cut, replica_id=replica_id, prepend_axis_num=depth
                    )
                )
        return pieces

    @torch.no_grad()
    def merge(pieces: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(pieces).view(experts.num_local_experts, -1, pieces[0].shape[-1])

    return ShardedTensorFactory(f"{prefix}experts.{linear}.weight", weight, build, merge, replica_id)
