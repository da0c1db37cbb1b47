"""The command line: every sub-command explains itself, bad input ends in a sentence, doctor never fails."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import megamoe
from megamoe import cli, diagnostics
from megamoe.diagnostics import Finding
from megamoe.errors import EngineUnavailableError, RankMismatchError

SECTIONS = {"versions", "GPUs", "links", "engines", "symmetric memory", "compilers", "environment"}


def test_doctor_prints_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for section in SECTIONS:
        assert section in printed


def test_doctor_json_gives_advice_for_every_no(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert {finding["section"] for finding in findings} >= SECTIONS
    for finding in findings:
        assert finding["detail"], finding
        assert finding["ok"] is not False or finding["advice"], f"a no without advice: {finding}"


def test_doctor_survives_a_failing_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[Finding]:
        yield Finding("x", "first", True, "fine")
        raise RuntimeError("driver fell over")

    monkeypatch.setattr(diagnostics, "SECTIONS", (broken,))
    first, failed = diagnostics.examine()
    assert first.ok
    assert failed.ok is False
    assert "driver fell over" in failed.detail


def test_doctor_tells_which_engine_runs_what() -> None:
    found = {finding.name: finding for finding in diagnostics.engines()}
    assert found["reference on cpu"].detail == "runs fp32, bf16, fp8_block, fp8_row, mxfp4"
    assert found["staged on cpu"].detail.startswith("runs fp32, bf16; not fp8_block, fp8_row, mxfp4: ")
    assert found["staged on cpu"].ok


def test_doctor_compiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEGAMOE_CACHE_DIR", str(tmp_path / "not yet" / "there"))
    found = {finding.name: finding for finding in diagnostics.compilers()}
    assert set(found) == {"nvrtc", "nvcc", "cache"}
    if sys.platform == "linux":
        assert "compiles for sm_90a" in found["nvrtc"].detail
    assert found["cache"].detail == f"{tmp_path / 'not yet' / 'there'}: 0 kernels, 0.0 MiB"
    assert not list(tmp_path.iterdir()), "looking leaves nothing behind"


def test_doctor_without_compilers_says_what_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise EngineUnavailableError("NVRTC could not be loaded (no such file); install nvidia-cuda-nvrtc")

    monkeypatch.setenv("MEGAMOE_COMPILER", "nvrtc")
    monkeypatch.setattr(diagnostics.compiler, "compile_source", missing)
    found = {finding.name: finding for finding in diagnostics.compilers()}
    assert found["nvrtc"].ok is False
    assert "install nvidia-cuda-nvrtc" in found["nvrtc"].detail
    assert "reference and staged" in found["nvrtc"].advice
    assert found["nvcc"].ok is None, "not asked for, so not missed"


def test_doctor_names_a_bad_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAMOE_TIMEOUT_S", "soon")
    finding = next(f for f in diagnostics.environment() if f.name == "MEGAMOE_TIMEOUT_S")
    assert finding.ok is False
    assert "soon" in finding.advice


def test_doctor_tells_gpus_and_links_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a Hopper and an older GPU, without a link between them."""
    devices = [
        SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=141 * 2**30),
        SimpleNamespace(name="NVIDIA A100", major=8, minor=0, multi_processor_count=108, total_memory=80 * 2**30),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: devices[index])
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: False)
    _, hopper, ampere = diagnostics.gpus()
    assert hopper.ok
    assert hopper.detail == "NVIDIA H200, 9.0, 132 SMs, 141 GiB"
    assert ampere.ok is False
    assert "compute capability 9.0" in ampere.advice
    link = next(diagnostics.links())
    assert (link.name, link.ok) == ("cuda:0 - cuda:1", False)
    assert "staged runs without" in link.advice


def test_doctor_needs_no_cuda_package() -> None:
    """As on a Mac: none of the packages with a Linux marker can be imported."""
    code = "import sys; sys.modules.update(dict.fromkeys(['cuda', 'nvidia', 'nvshmem', 'triton', 'matplotlib']))\n"
    code += "from megamoe.cli import main; sys.exit(main(['doctor', '--json']))"
    environment = {**os.environ, "PYTHONPATH": str(Path(megamoe.__file__).parent.parent), "MEGAMOE_COMPILER": "nvrtc"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert "probe" not in found, "no section falls over"
    assert found["nvrtc"]["ok"] is False
    assert "nvidia-cuda-nvrtc" in found["nvrtc"]["detail"]
    assert found["staged on cpu"]["ok"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("top_k must be at most 16, got 17"), 2),
        (RankMismatchError("rank 1 has top_k 3, rank 0 has 2"), 2),
        (EngineUnavailableError("NVRTC could not be loaded"), 1),
    ],
)
def test_an_error_becomes_one_sentence(
    error: Exception, status: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(arguments: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr("megamoe.commands.doctor.run", fail)
    assert cli.main(["doctor"]) == status
    captured = capsys.readouterr()
    assert captured.err == f"megamoe doctor: {error}\n"
    assert captured.out == ""


def test_every_command_module_is_offered() -> None:
    modules = [path for path in (Path(megamoe.__file__).parent / "commands").glob("*.py") if path.stem != "__init__"]
    offering = {path.stem for path in modules if "\ndef add(" in path.read_text(encoding="utf-8")}
    assert offering == set(cli.COMMANDS)


def test_without_a_command_usage_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([])
    assert caught.value.code == 2
    assert "doctor" in capsys.readouterr().err


def test_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "megamoe", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "doctor" in done.stdout


def test_doctor_tells_which_memory_cpu_ranks_share(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEGAMOE_SHM_DIR", str(tmp_path))
    found = {f.name: f for f in diagnostics.symmetric_memory()}
    assert found["shm"].ok and "cpu" in found["shm"].detail
    assert found["local"].ok and found["torch"].ok is not False
    assert found["shm folder"].detail.startswith(f"{tmp_path} has ")
    monkeypatch.setenv("MEGAMOE_SHM_DIR", str(tmp_path / "none"))
    assert any(f.ok is False and "does not exist" in f.detail for f in diagnostics.symmetric_memory())
