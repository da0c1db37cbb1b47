"""Portable state: one tensor an expert, in place, for torch.distributed.checkpoint and anything else by name."""

from __future__ import annotations

import torch
from torch import nn

from megamoe.checkpoint.entries import check, entries


def portable_state_dict(module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, torch.Tensor]:
    """This rank's part of a state that names every expert, ready for ``torch.distributed.checkpoint``.

        state = portable_state_dict(model, optimizer)
        dcp.save(state, checkpoint_id=folder)
        ...
        init_optimizer_state(optimizer)                     # with any other number of ranks
        state = portable_state_dict(model, optimizer)
        dcp.load(state, checkpoint_id=folder)               # writes into state
        load_portable_state_dict(state, model, optimizer)

    Tensors are views of the model's own storage, so loading into them mostly is loading the model; FSDP's dense
    parameters stay DTensors, which DCP reshards, and only experts that FSDP shards are copies (and a collective of
    their mesh). The optimiser's hyperparameters are not in here: they are the script's.
    """
    state: dict[str, torch.Tensor] = {}
    for entry in entries(module, optimizer):
        if entry.experts is None:
            state[entry.name] = entry.tensor
            continue
        whole = entry.whole()
        for slot, expert in enumerate(entry.experts.local_experts):
            state[entry.portable_name(expert)] = whole[slot]
    return state


def load_portable_state_dict(
    state: dict[str, torch.Tensor],
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    strict: bool = True,
) -> None:
    """Overwrite model and optimiser with ``state``, which holds at least this rank's experts.

    Raises:
        ValueError: missing, unexpected or wrongly shaped tensors, named; nothing is overwritten then.
    """
    found = entries(module, optimizer)
    check(found, {name: tuple(tensor.shape) for name, tensor in state.items()}, state, strict)
    for entry in found:
        entry.fill(state.__getitem__)


def init_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Create the state that most optimisers create in their first step, so that there is something to load into.

    Takes one step with zero gradients and learning rate 0; gradients and hyperparameters are put back.
    """
    if any(optimizer.state.values()):
        return
    groups = optimizer.param_groups
    parameters = [p for group in groups for p in group["params"] if p.requires_grad]
    grads = [p.grad for p in parameters]
    rates = [group["lr"] for group in groups]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = torch.zeros_like(rate) if isinstance(rate, torch.Tensor) else 0.0
    optimizer.step()
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
