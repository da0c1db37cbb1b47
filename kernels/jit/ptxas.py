"""What ptxas said about one kernel, read from its log."""

from __future__ import annotations

import re
from dataclasses import dataclass

# "24 bytes spill stores, 28 bytes spill loads" (13.x) and "24 bytes spill stores" on a line of its own (older logs).
_SPILL = re.compile(r"(\d+) bytes spill (stores|loads)")
_STACK = re.compile(r"(\d+) bytes stack frame")
_USED = re.compile(r"Used (\d+) registers")
_BARRIERS = re.compile(r"used (\d+) barriers")
_SMEM = re.compile(r"(\d+) bytes smem")
_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_CODE = re.compile(r"\bC(\d{4})\b")

# How ptxas introduces C7508 (setmaxnreg ignored), C7510 to C7520 (WGMMA serialised) and their kin.
_LOSS = "Potential Performance Loss"


@dataclass(frozen=True, kw_only=True)
class PtxasReport:
    """Resources of one kernel. ``codes`` holds the numbers of ptxas' remarks (C7508 ...), ``warnings`` their lines."""

    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    smem_bytes: int  # static shared memory
    barriers: int
    codes: tuple[str, ...]
    warnings: tuple[str, ...]

    @staticmethod
    def from_log(log: str, entry: str) -> PtxasReport:
        """Report of ``entry``. Raises ValueError if the log does not mention it (no ``--ptxas-options=-v``)."""
        sections = _ENTRY.split(log)
        names = sections[1::2]
        if entry not in names:
            raise ValueError(f"the ptxas log speaks of {names or 'no kernel'}, not of {entry!r}")
        text = sections[2 + 2 * names.index(entry)]
        spills = {kind: int(count) for count, kind in _SPILL.findall(text)}
        warnings = [line.strip() for line in log.splitlines() if "warning" in line.lower() or _CODE.search(line)]
        return PtxasReport(
            registers=_first(_USED, text),
            stack_bytes=_first(_STACK, text),
            spill_store_bytes=spills.get("stores", 0),
            spill_load_bytes=spills.get("loads", 0),
            smem_bytes=_first(_SMEM, text),
            barriers=_first(_BARRIERS, text),
            codes=tuple(sorted({f"C{number}" for line in warnings for number in _CODE.findall(line)})),
            warnings=tuple(dict.fromkeys(warnings)),
        )

    def faults(self, spills: int = 0) -> list[str]:
        """What makes a kernel unfit for the tensor cores' pace: more than ``spills`` bytes of spilled registers stored
        or loaded, serialised WGMMA, ignored setmaxnreg."""
        found = [line for line in self.warnings if _LOSS in line]
        if max(self.spill_store_bytes, self.spill_load_bytes) > spills:
            found.append(f"spills {self.spill_store_bytes} bytes of stores and {self.spill_load_bytes} of loads")
        return found


def _first(pattern: re.Pattern[str], text: str) -> int:
    match = pattern.search(text)
    return int(match.group(1)) if match else 0
