"""What a checkpoint consists of: every tensor of a model, and on request of its optimiser, with its experts known.

Three spellings of one expert tensor ``w13`` of a layer ``ffn``:

- *local*, torch's own ``state_dict``: ``ffn.experts.w13`` [S, 2I, H], the slots of this rank;
- *full*: ``ffn.experts.w13`` [E, 2I, H], in order of experts: the local one of a single rank;
- *portable*: ``ffn.experts.7.w13`` [2I, H], one tensor an expert, which says the same wherever expert 7 stands.

An optimiser's state of it follows as ``optimizer.ffn.experts.7.w13.exp_avg``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from megamoe.dtensor import store
from megamoe.experts import Experts

OPTIMIZER = "optimizer."


@dataclass(frozen=True)
class Entry:
    """One tensor in storage of the model or optimiser: ``{stem}{leaf}`` is its local and full name.

    ``experts`` None: a tensor alike on all ranks, or FSDP's shard of one. Otherwise [S, ...], one row a local slot.
    """

    stem: str
    leaf: str
    tensor: torch.Tensor
    experts: Experts | None

    @property
    def name(self) -> str:
        """Local and full name."""
        return self.stem + self.leaf

    def portable_name(self, expert: int) -> str:
        """Name of one expert's row."""
        return f"{self.stem}{expert}.{self.leaf}"

    def portable_names(self) -> list[str]:
        """Names of all E experts' rows, or the one name of a tensor without experts."""
        if self.experts is None:
            return [self.name]
        return [self.portable_name(e) for e in range(self.experts.problem.num_experts)]

    def whole(self) -> torch.Tensor:
        """The tensor itself, or assembled from FSDP's shards: then a copy, and a collective of their mesh."""
        return self.tensor.full_tensor() if isinstance(self.tensor, DTensor) else self.tensor

    @torch.no_grad()
    def fill(self, read: Callable[[str], torch.Tensor]) -> None:
        """Overwrite the tensor; ``read`` takes a portable name. Casts as ``Tensor.copy_`` does."""
        if self.experts is None:
            store(self.tensor, read(self.name))
            return
        target = torch.empty_like(self.whole()) if isinstance(self.tensor, DTensor) else self.tensor
        for slot, expert in enumerate(self.experts.local_experts):
            target[slot].copy_(read(self.portable_name(expert)))
        if isinstance(self.tensor, DTensor):
            store(self.tensor, target)


def bare(module: nn.Module) -> nn.Module:
    """``module`` without DDP and ``torch.compile`` around it, so that names are the model's own."""
    while True:
        if isinstance(module, DistributedDataParallel):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            return module


def entries(module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[Entry]:
    """Every tensor of ``module.state_dict()`` and of the optimiser's state, in a fixed order.

    Raises:
        ValueError: something in there is not a tensor, or the optimiser has a parameter that the module lacks.
    """
    module = bare(module)
    expert_tensors = _expert_tensors(module)
    found = []
    for name, tensor in module.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name} is a {type(tensor).__name__}; these checkpoints hold tensors only")
        experts = expert_tensors.get(name)
        stem, leaf = _split(name) if experts is not None else ("", name)
        found.append(Entry(stem, leaf, tensor, experts))
    if optimizer is not None:
        found += _optimizer_entries(module, optimizer, expert_tensors)
    return found


def _expert_tensors(module: nn.Module) -> dict[str, Experts]:
    return {
        f"{prefix}.{name}" if prefix else name: child
        for prefix, child in module.named_modules()
        if isinstance(child, Experts)
        for name, _ in child.named_parameters()
    }


def _split(name: str) -> tuple[str, str]:
    stem, dot, leaf = name.rpartition(".")
    return stem + dot, leaf


def _optimizer_entries(
    module: nn.Module, optimizer: torch.optim.Optimizer, expert_tensors: dict[str, Experts]
) -> Iterator[Entry]:
    names = {id(p): name for name, p in module.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names.get(id(parameter))
            if name is None:
                raise ValueError(f"the optimiser has a parameter {tuple(parameter.shape)} that the module lacks")
            for key, value in optimizer.state.get(parameter, {}).items():
                if value is not None:
                    yield _optimizer_entry(name, key, value, parameter, expert_tensors.get(name))


def _optimizer_entry(name: str, key: str, value: object, parameter: torch.Tensor, experts: Experts | None) -> Entry:
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"the optimiser's {key} of {name} is a {type(value).__name__}, and checkpoints hold tensors")
    if experts is None or value.dim() == 0:  # a step count is alike on all ranks
        return Entry(OPTIMIZER, f"{name}.{key}", value, None)
    if len(value) != len(parameter):
        raise ValueError(
            f"the optimiser's {key} of {name} must have a row for each of {len(parameter)} experts, "
            f"got {tuple(value.shape)}"
        )
    stem, leaf = _split(name)
    return Entry(OPTIMIZER + stem, f"{leaf}.{key}", value, experts)


def check(found: Iterable[Entry], shapes: dict[str, tuple[int, ...]], names: Iterable[str], strict: bool) -> None:
    """Refuse a checkpoint that does not fit, before anything is overwritten.

    Args:
        found: what is to be filled.
        shapes: portable name -> shape, of the tensors this rank will read, where the checkpoint has them.
        names: all portable names in the checkpoint.
        strict: whether names that nobody reads are an error; missing ones and wrong shapes always are.

    Raises:
        ValueError: naming missing and unexpected tensors, and wrong shapes with got and expected.
    """
    known: set[str] = set()
    problems: list[str] = []
    missing: list[str] = []
    for entry in found:
        known.update(entry.portable_names())
        experts = entry.experts
        wanted = [entry.name] if experts is None else [entry.portable_name(e) for e in experts.local_experts]
        expected = tuple(entry.tensor.shape[0 if experts is None else 1 :])
        for name in wanted:
            if name not in shapes:
                missing.append(name)
            elif shapes[name] != expected:
                problems.append(f"{name} must have shape {expected}, got {shapes[name]}")
    if missing:
        problems.append(f"missing: {_some(missing)}")
    unexpected = [name for name in names if name not in known]
    if strict and unexpected:
        problems.append(f"unexpected: {_some(unexpected)}")
    if problems:
        raise ValueError("the checkpoint does not fit the model; " + "; ".join(problems[:8]))


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
