from __future__ import annotations

from pathlib import Path

from megamoe.kernels.jit.cache import KernelCache
from megamoe.kernels.jit.source import KernelSource
from megamoe.kernels.jit.sweep import Case, summary, sweep
from tests.kernels.jit_kernels import saxpy, serialised, spilling, tile


def test_each_case_gets_its_verdict_in_order(tmp_path: Path) -> None:
    KernelCache(tmp_path).get(saxpy())
    cases = [
        Case(tile(), needs=("QGMMA", "UTMALDG")),
        Case(saxpy(), needs=("QGMMA",)),
        Case(spilling()),
        Case(serialised()),
        Case(KernelSource("broken", "nonsense", "k")),
        Case(tile(), needs=("QGMMA", "UTMALDG")),
    ]
    verdicts = sweep(cases, root=tmp_path, workers=2)
    assert [v.name for v in verdicts] == ["tile", "saxpy", "spilling", "serialised", "broken", "tile"]
    fit, lacking, spilled, serial, broken, again = verdicts
    assert fit.faults == () and fit.opcodes["QGMMA"] == 4 and again is fit
    assert lacking.faults == ("holds no QGMMA",) and lacking.from_disk and not fit.from_disk
    assert any("spills" in fault for fault in spilled.faults)
    assert any("STL" in fault for fault in spilled.faults)
    assert len(serial.faults) == 1 and "C7520" in serial.faults[0]
    assert broken.report is None and "broken did not compile" in broken.faults[0]
    text = summary(verdicts)
    assert text.splitlines()[0] == "saxpy: holds no QGMMA"
    assert "6 kernels, 4 unfit" in text

    (forgiven,) = sweep([Case(spilling(), spills=spilled.report.spill_store_bytes + 10_000)], root=tmp_path, workers=1)
    assert forgiven.faults == () and forgiven.opcodes["STL"] > 0
    (still,) = sweep([Case(spilling(), spills=1)], root=tmp_path, workers=1)
    assert len(still.faults) == 1 and "spills" in still.faults[0]

    warm = sweep(cases[:1], root=tmp_path, workers=1, disassemble=False)
    assert warm[0].from_disk and warm[0].faults == () and warm[0].opcodes == {}


def test_no_case_is_no_fault() -> None:
    assert sweep([]) == []
    assert summary([]) == "0 kernels, 0 unfit, slowest 0.0 s"
