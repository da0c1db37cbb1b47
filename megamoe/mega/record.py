"""What a kernel whose wait has expired tells the host, as a sentence; twin of ``comm::Record`` (comm/protocol.cuh)."""

from __future__ import annotations

import ctypes

import torch

from megamoe import env
from megamoe.errors import MegaMoEError, PeerTimeout

_PHASES = {
    1: "all of its own CTAs to start (does another kernel hold multiprocessors?)",
    2: "rank {peer} to start its call",
    3: "rows of rank {peer} for local expert {index}",
    4: "its own CTAs to compute block {index} of the first GEMM",
    5: "rank {peer} to send its results",
    7: "its own loaders and math warps",
    8: "its own CTAs to copy or cast the rows of block {index}",
    9: "its own CTAs to compute all rows of y, which it adds up",
}
_PEER = 6  # another rank gave up: index says which, expected in which phase, peer on whom
_WORDS = 8


class Records:
    """Host-mapped words of one rank: a ``comm::Record`` and, behind it, a ``WaitRecord``."""

    def __init__(self, device: torch.device) -> None:
        self.tensor = torch.zeros(_WORDS + 4, dtype=torch.int32)
        if device.type == "cuda":
            self.tensor = self.tensor.pin_memory()
        self._words = (ctypes.c_uint32 * (_WORDS + 4)).from_address(self.tensor.data_ptr())

    @property
    def record(self) -> int:
        return self.tensor.data_ptr()

    @property
    def ring_record(self) -> int:
        return self.tensor.data_ptr() + 4 * _WORDS

    def clear(self) -> None:
        """Forget what was reported."""
        ctypes.memset(self.record, 0, 4 * (_WORDS + 4))

    def error(self) -> MegaMoEError | None:
        """What was reported, if anything; reads host memory only, never waits."""
        phase, rank, peer, block, index, expected, seen, epoch = self._words[:_WORDS]
        limit = env.get("MEGAMOE_TIMEOUT_S")
        if phase:
            waited = f"waited longer than MEGAMOE_TIMEOUT_S ({limit:g} s) for"
            if phase == _PEER:
                what = _PHASES.get(expected, f"wait {expected}").format(peer=peer, index="?")
                told = f"rank {rank} was told to stop in call {epoch}: rank {index} {waited} {what}"
            else:
                what = _PHASES.get(phase, f"wait {phase}").format(peer=peer, index=index)
                told = f"rank {rank} {waited} {what}: block {block} awaited {expected} and saw {seen} in call {epoch}"
            return PeerTimeout(
                f"{told}. y of that call is NaN; reset() the workspace on every rank, or make a new group and "
                "workspace if a rank is gone."
            )
        code, block, stage, parity = self._words[_WORDS:]
        if code:
            return MegaMoEError(
                f"block {block} of the mega-kernel waited too long for stage {stage} (wait {code}, parity {parity}); "
                "y of that call is void. This is a defect of the kernel or of the device, not of the call."
            )
        return None
