"""``mega``: forward in one persistent kernel (megamoe/mega), over memory that all ranks of the group address.

The handshake before each call stands here too: bad arguments on one rank raise on all, and the host waits for the
device once a call. Without it, and in graphs, call ``MegaRunner`` directly. Backward is that of ``staged``: nothing is
kept for it but who sends how many rows where, so it sends the rows again and runs the first GEMM again.
"""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist

from megamoe.dispatch import placement as placements
from megamoe.dispatch.placement import Placement
from megamoe.dispatch.plan import SendPlan
from megamoe.dispatch.planner import plan_on_device
from megamoe.engines import experts, mega_workspaces, packet
from megamoe.engines.base import Call, Grads, Traffic
from megamoe.engines.saved import Saved
from megamoe.engines.staged import Staged
from megamoe.engines.wire import Wire
from megamoe.errors import MegaMoEError
from megamoe.problem import Problem


class Mega:
    """See the module's text."""

    name = "mega"

    def why_not(self, problem: Problem, device: torch.device, group: dist.ProcessGroup | None) -> str | None:
        """The kernel is written for Hopper, and ranks need memory in common."""
        if device.type != "cuda":
            return f"the mega-kernel runs on GPUs of compute capability 9.0, not on {device.type}"
        if not torch.cuda.is_available():
            return "the mega-kernel needs a CUDA device, none is visible"
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) != (9, 0):
            return f"the mega-kernel is written for compute capability 9.0, {device} has {major}.{minor}"
        from megamoe.mega.runner import why_not

        slots = -(-problem.num_experts // problem.world_size)
        return why_not(problem, slots) or _no_compiler() or _no_memory_in_common(device, group)

    def forward(self, call: Call, plan: SendPlan, traffic: Traffic, save: bool) -> tuple[torch.Tensor, Saved | None]:
        """See ``Engine.forward``. The first call of a problem on a group allocates its workspace."""
        if not traffic.workspaces:  # some rank has none: all make a new one
            mega_workspaces.drop(call)
            held = mega_workspaces.create(call)
        else:
            held = mega_workspaces.of_group(call.group).workspaces[mega_workspaces.key_of(call)]
        x = call.x.detach()
        if x.shape[0] and (x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16):
            x = x.clone(memory_format=torch.contiguous_format)
        slots = call.topk_idx
        if not _is_contiguous(call.placement):
            slots = call.placement.route(slots, call.rank)
        stream = torch.cuda.current_stream(x.device)
        stream.wait_event(held.last)
        y = held.runner.forward(
            x, slots.contiguous(), call.topk_weights.detach().contiguous(), mega_workspaces.prepared(call.weights, call)
        )
        held.last.record(stream)
        if not save:
            return y, None
        return y, Saved.make(
            self.name, call.problem, x.device,
            num_routes=traffic.recv_routes, send_rows=traffic.send_rows, recv_rows=traffic.recv_rows,
        )  # fmt: skip

    def backward(self, call: Call, saved: Saved, grad_y: torch.Tensor, need_weights: bool) -> Grads:
        """See ``Engine.backward``; recipe bf16."""
        problem, wire = call.problem, Wire(call.group, call.x.device)
        send, recv = saved.send_rows, saved.recv_rows
        plan = plan_on_device(call.topk_idx, call.placement, call.rank)
        n = sum(send)
        rows = packet.pack(call.x, call.topk_weights, plan.token_idx[:n], plan.topk_slot[:n], problem)
        rows = wire.exchange(rows, send, recv, "backward: dispatch of x")
        pool = experts.Pool.of(rows, saved.num_routes, call.placement.slots_per_rank, problem)
        h13 = experts.preactivations(pool, call.weights, problem)
        return Staged().backward(call, saved._replace(rows=rows, h13=h13), grad_y, need_weights)


def why_no_backward(problem: Problem) -> str | None:
    """None if ``backward`` can follow a forward of ``problem``, else a sentence."""
    if problem.recipe == "bf16":
        return None
    return (
        f"mega has no backward for the recipe {problem.recipe} in this version: call it under torch.no_grad(), or take "
        "the engine reference"
    )


def _no_memory_in_common(device: torch.device, group: dist.ProcessGroup | None) -> str | None:
    if group is None or group.size() == 1:
        return None
    if (reason := mega_workspaces.of_group(group).unreachable) is not None:
        return reason
    from megamoe.symm_mem.select import BACKENDS

    reasons = {}
    for name in ("torch", "nvshmem"):
        reasons[name] = BACKENDS[name].why_not(device, group)
        if reasons[name] is None:
            return None
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    return f"the ranks have no memory that all of them address: {told}"


@functools.cache
def _no_compiler() -> str | None:
    from megamoe.kernels.jit.compiler import chosen_compiler, compiler_id

    try:
        compiler_id(chosen_compiler())
    except MegaMoEError as error:
        return f"kernels can't be compiled: {error}"
    return None


@functools.lru_cache(maxsize=256)
def _is_contiguous(placement: Placement) -> bool:
    """Whether expert e is physical slot e."""
    if placement.num_experts % placement.world_size:
        return False
    return placement == placements.contiguous(placement.num_experts, placement.world_size)
