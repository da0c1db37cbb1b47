"""Yield hints between FFMAs, written into a cubin.

Two math warps of a scheduler take turns: one multiplies on the tensor cores while the other promotes, 64 FFMAs in a
row. Unless every second FFMA carries the hint that another warp may go first, the promoting warp keeps the scheduler
and the other's next MMA is issued late: 7 to 10% of an FP8 GEMM on an H200 (docs/performance.md). ptxas puts the hints
in where the FFMAs stand in one basic block with the MMAs they follow, and leaves them out elsewhere; no option asks for
them. DeepGEMM once did the same to its binaries, for the same reason.

Only hints change: the yield bit is advice to the scheduler, and a reuse flag, cleared where a warp may be changed for
another, only saves a register read. sm_90 instructions are 16 bytes; of their 128 bits, 0 to 11 are the opcode, 109
is 0 where the warp may yield, 122 to 125 keep operands for the next instruction.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

_BYTES = 16
_OPCODES = (0x223, 0x221)  # FFMA and FADD of registers
_STAYS = 1 << (109 - 64)
_REUSE = 0xF << (122 - 64)
_GAP = 6  # other instructions that may stand in between
_LEAST = 16  # a shorter run is no promotion


def interleave(cubin: bytes, entry: str) -> bytes:
    """``cubin`` with every second FFMA (or FADD) of each long run of them in ``entry`` willing to yield.

    Raises:
        ValueError: no 64-bit ELF file, or no code of ``entry`` in it.
    """
    start, size = _section(cubin, f".text.{entry}")
    changed = bytearray(cubin)
    for run in _runs(cubin[start : start + size]):
        for turn, at in enumerate(run):
            high = start + at + 8
            (word,) = struct.unpack_from("<Q", changed, high)
            word = word | _STAYS if turn % 2 == 0 else word & ~(_STAYS | _REUSE)
            struct.pack_into("<Q", changed, high, word)
    return bytes(changed)


def _runs(code: bytes) -> Iterator[list[int]]:
    """Offsets of the FFMAs of each run."""
    run: list[int] = []
    for at in range(0, len(code), _BYTES):
        if int.from_bytes(code[at : at + 2], "little") & 0xFFF not in _OPCODES:
            continue
        if run and at - run[-1] > (_GAP + 1) * _BYTES:
            if len(run) >= _LEAST:
                yield run
            run = []
        run.append(at)
    if len(run) >= _LEAST:
        yield run


def _section(elf: bytes, name: str) -> tuple[int, int]:
    """Offset and size of a section by name."""
    if elf[:5] != b"\x7fELF\x02":
        raise ValueError(f"a cubin must be a 64-bit ELF file, got one that begins with {elf[:5]!r}")
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names_at = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
    names = headers[names_at][4]
    for header in headers:
        at = names + header[0]
        if elf[at : elf.index(b"\0", at)].decode() == name:
            return header[4], header[5]
    raise ValueError(f"the cubin holds no section {name}")
