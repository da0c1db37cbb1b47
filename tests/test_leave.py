"""How programs end: as the interpreter would, and at once where they are ranks of a launch."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch.distributed as dist

from megamoe.leave import leave
from tests.lm_case import environment


class Ended(BaseException):
    """os._exit, in a test."""


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """This process as a rank that only seems to end; what it did before."""
    done: list[str] = []

    def end(status: int) -> NoReturn:
        raise Ended(status)

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(atexit, "_run_exitfuncs", lambda: done.append("exit functions"))
    monkeypatch.setattr(time, "sleep", lambda seconds: done.append(f"{seconds} s"))
    return done


def raises(error: BaseException) -> Callable[[], int]:
    def main() -> int:
        raise error

    return main


def test_without_a_launch_the_interpreter_ends_as_ever(heard: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK")
    with pytest.raises(SystemExit, match="3"):
        leave(lambda: 3)
    with pytest.raises(ZeroDivisionError):
        leave(raises(ZeroDivisionError()))
    assert not heard


@pytest.mark.parametrize(
    ("main", "status", "said"),
    [
        (lambda: 0, 0, ""),
        (lambda: 1, 1, ""),
        (raises(SystemExit()), 0, ""),
        (raises(SystemExit(2)), 2, ""),
        (raises(SystemExit("needs a rank")), 1, "needs a rank\n"),
        (raises(RuntimeError("broken")), 1, "RuntimeError: broken\n"),
        (raises(KeyboardInterrupt()), 130, "KeyboardInterrupt\n"),
    ],
)
def test_a_rank_ends_with_the_status_it_would_have(
    main: Callable[[], int], status: int, said: str, heard: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Ended, match=rf"^{status}$"):
        leave(main)
    err = capsys.readouterr().err
    assert err.endswith(said) and bool(err) == bool(said)
    assert heard == ["exit functions"]


@pytest.mark.parametrize(
    ("rank", "status", "expected"),
    [(0, 1, ["2 s"]), (1, 1, []), (1, 2, ["2 s"]), (1, 0, ["exit functions"])],
)
def test_where_a_group_was_given_up_nothing_waits_for_ranks(
    rank: int, status: int, expected: list[str], heard: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    with pytest.raises(Ended, match=rf"^{status}$"):
        leave(lambda: status)
    assert heard == expected


RANK = """
import atexit, sys, threading, time
import torch.distributed as dist
from megamoe.leave import leave

def main():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if "break" in sys.argv:
        if rank == 1:
            raise RuntimeError("rank 1 is broken")
        time.sleep(600)
    dist.barrier()
    dist.destroy_process_group()
    threading.Thread(target=time.sleep, args=(600,)).start()  # an interpreter that ends would wait for it
    atexit.register(lambda: sys.stdout.write("!?"[rank]))
    sys.stdout.write("<>"[rank] * 100_000)
    return 0

leave(main)
"""


def torchrun(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "rank.py").write_text(RANK, encoding="utf-8")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "rank.py"]
    return subprocess.run(
        [*start, *arguments], cwd=folder, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )


def test_ranks_end_at_once_and_lose_nothing(tmp_path: Path) -> None:
    done = torchrun(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [done.stdout.count(c) for c in "<>!?"] == [100_000, 100_000, 1, 1]


def test_a_rank_that_breaks_says_where_and_fails(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "break")
    assert done.returncode == 1, done.stderr[-3000:]
    assert "rank.py" in done.stderr and "in main" in done.stderr and "RuntimeError: rank 1 is broken" in done.stderr
    assert "exitcode  : 1 " in done.stderr, done.stderr[-3000:]
