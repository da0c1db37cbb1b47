"""Collectives of one group that end: an all-to-all of rows which raises PeerTimeout instead of waiting for ever.

Over gloo (CPU tensors, or CUDA tensors staged through the CPU) each exchange waits on the host, at most
``MEGAMOE_TIMEOUT_S``. Over NCCL an exchange is queued on the current stream; only ``host_exchange`` waits for it, so a
rank that vanishes between two calls is found by the next call.
"""

from __future__ import annotations

import datetime
import time
import weakref

import torch
import torch.distributed as dist

from megamoe import env
from megamoe.engines import liveness
from megamoe.errors import PeerTimeout

_broken: weakref.WeakKeyDictionary[dist.ProcessGroup, str] = weakref.WeakKeyDictionary()


def _backend_name(group: dist.ProcessGroup, device_type: str) -> str | None:
    try:
        return str(group._get_backend(torch.device(device_type)).name())
    except RuntimeError:
        return None


class Wire:
    """The group's all-to-all for tensors of ``device``. ``group`` None: one rank, exchanges return their input."""

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.group = group
        self.device = device
        self.size = 1 if group is None else group.size()
        self.rank = 0 if group is None else group.rank()
        cpu = torch.device("cpu")
        if group is None:
            self.payload_device, self.host_device = device, cpu
            return
        has_nccl = _backend_name(group, "cuda") == "nccl"
        self.payload_device = device if device.type == "cuda" and has_nccl else cpu
        # What the host reads goes over the CPU where it can: failures are noticed at once there.
        has_cpu = _backend_name(group, "cpu") is not None
        cuda = device if device.type == "cuda" else torch.device("cuda", torch.cuda.current_device() if has_nccl else 0)
        self.host_device = cpu if has_cpu else cuda

    def carries(self) -> bool:
        """Whether tensors on ``device`` can travel: not from the CPU over a group that has NCCL alone."""
        return self.group is None or self.device.type == "cuda" or self.host_device.type == "cpu"

    def exchange(self, rows: torch.Tensor, send: list[int], recv: list[int], phase: str) -> torch.Tensor:
        """Rows [sum(send), ...] in order of destination -> [sum(recv), ...] in order of source, on ``self.device``."""
        if self.group is None:
            return rows
        return self._all_to_all(rows.to(self.payload_device), send, recv, phase, wait=False).to(self.device)

    def host_exchange(self, rows: torch.Tensor, phase: str) -> torch.Tensor:
        """[R, n] on ``host_device``, row r for rank r -> [R, n] there; has arrived when this returns."""
        if self.group is None:
            return rows
        ones = [1] * self.size
        return self._all_to_all(rows, ones, ones, phase, wait=True)

    def gather(self, tensor: torch.Tensor, phase: str) -> torch.Tensor:
        """[n, ...] of every rank -> [R * n, ...]."""
        if self.group is None:
            return tensor
        n = tensor.shape[0]
        every = tensor.unsqueeze(0).expand(self.size, *tensor.shape).reshape(self.size * n, *tensor.shape[1:])
        return self.exchange(every, [n] * self.size, [n] * self.size, phase)

    def _all_to_all(
        self, rows: torch.Tensor, send: list[int], recv: list[int], phase: str, *, wait: bool
    ) -> torch.Tensor:
        group = self.group
        assert group is not None and rows.shape[0] == sum(send)
        if group in _broken:
            raise PeerTimeout(f"{_broken[group]} This group can't be used any more: make a new one.")
        limit_s = float(env.get("MEGAMOE_TIMEOUT_S"))
        deadline = time.monotonic() + limit_s
        out = rows.new_empty(sum(recv), *rows.shape[1:])
        options = dist.AllToAllOptions()
        patience_s = 0.8 * limit_s  # the rest is for finding out who is missing
        if not rows.is_cuda:  # NCCL's watchdog would end the process at this limit, where we raise instead
            options.timeout = datetime.timedelta(seconds=patience_s)
        failure: str | None = None
        try:
            work = group.alltoall_base(out, rows.contiguous(), recv, send, options)
            if wait and rows.is_cuda:
                while not work.is_completed():
                    if time.monotonic() > deadline - limit_s + patience_s:
                        failure = f"no answer within {patience_s:g} s"
                        break
                    time.sleep(20e-6)
            if failure is None:
                work.wait()
        except RuntimeError as error:
            failure = str(error)
        if failure is not None:
            raise _lost(group, phase, failure, deadline)
        return out


def _lost(group: dist.ProcessGroup, phase: str, failure: str, deadline: float) -> PeerTimeout:
    if group not in _broken:
        _broken[group] = liveness.report(group, phase, failure, deadline)
        if _backend_name(group, "cuda") == "nccl":
            liveness.abort(group)
    return PeerTimeout(_broken[group])
