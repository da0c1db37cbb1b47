"""What the host says of a wait that has expired: the words of ``comm::Record`` as a sentence."""

from __future__ import annotations

import ctypes
import re

import pytest
import torch

from megamoe.errors import MegaMoEError, PeerTimeout
from megamoe.mega.record import Records
from tests.repo import ROOT

WAITS = ROOT / "megamoe/kernels/include/megamoe/comm/waits.cuh"


def written(*words: int) -> Records:
    records = Records(torch.device("cpu"))
    (ctypes.c_uint32 * len(words)).from_address(records.record)[:] = words
    return records


def phases() -> dict[str, int]:
    """``enum class Phase`` of the header."""
    text = re.search(r"enum class Phase : u32 \{([^}]*)\}", WAITS.read_text(encoding="utf-8"))
    assert text
    return {name: int(value) for name, value in re.findall(r"k(\w+) = (\d+)", text.group(1))}


def test_nothing_is_said_while_all_is_well() -> None:
    assert written().error() is None


@pytest.mark.parametrize(
    ("phase", "sentence"),
    [
        ("Grid", "all of its own CTAs to start"),
        ("Header", "rank 5 to start its call"),
        ("Rows", "rows of rank 5 for local expert 7"),
        ("Tiles", "its own CTAs to compute block 7 of the first GEMM"),
        ("Done", "rank 5 to send its results"),
        ("Ring", "its own loaders and math warps"),
    ],
)
def test_a_wait_of_this_rank(phase: str, sentence: str) -> None:
    error = written(phases()[phase], 2, 5, 9, 7, 40, 39, 3).error()
    assert isinstance(error, PeerTimeout)
    for part in ("rank 2 waited longer", sentence, "block 9 awaited 40 and saw 39 in call 3", "NaN", "reset()"):
        assert part in str(error)


def test_a_rank_that_was_told_names_who_was_missing() -> None:
    error = written(phases()["Peer"], 2, 5, 9, 0, phases()["Header"], 0, 3).error()
    assert isinstance(error, PeerTimeout)
    assert "rank 2 was told to stop in call 3: rank 0 waited longer" in str(error)
    assert "for rank 5 to start its call. y" in str(error)


def test_every_phase_has_a_sentence() -> None:
    for name, value in phases().items():
        if name not in ("None", "Peer"):
            assert f"wait {value}" not in str(written(value, *range(7)).error()), name


def test_clear_forgets() -> None:
    records = written(phases()["Done"], 1, 0, 0, 0, 1, 0, 1)
    assert isinstance(records.error(), MegaMoEError)
    records.clear()
    assert records.error() is None
