from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from megamoe.kernels.jit import cache as cache_module
from megamoe.kernels.jit import store as store_module
from megamoe.kernels.jit.cache import KernelCache, cache_key
from megamoe.kernels.jit.compiler import compiler_id, toolkit_headers
from megamoe.kernels.jit.source import Headers, KernelSource
from tests.kernels.jit_kernels import saxpy, tile


def only_entry(root: Path) -> Path:
    (path,) = (p for p in root.iterdir() if not p.name.startswith(".megamoe-tmp-"))
    return path


def test_second_process_reads_what_the_first_wrote(tmp_path: Path) -> None:
    first, second = KernelCache(tmp_path), KernelCache(tmp_path)
    compiled = first.get(saxpy())
    assert first.get(saxpy()) is compiled
    assert second.get(saxpy()) == compiled
    assert (first.num_compiled, first.num_from_disk) == (1, 0)
    assert (second.num_compiled, second.num_from_disk) == (0, 1)
    (entry,) = second.store.entries()
    assert entry.name == "saxpy" and entry.report == compiled.report and entry.arch == "sm_90a"
    assert (entry.path / "kernel.cu").read_text() == saxpy().code
    assert second.store.damaged() == []


@pytest.mark.parametrize(
    "other",
    [
        {"code": "int x;"},
        {"options": ("-lineinfo",)},
        {"arch": "sm_100a"},
        {"entry": "f"},
        {"name": "m"},
    ],
)
def test_all_that_decides_the_code_is_in_the_key(other: dict[str, Any]) -> None:
    facts: dict[str, Any] = {"name": "n", "code": "", "entry": "e"}
    none = Headers({}, {})
    keys = {
        cache_key(KernelSource(**facts), none, "nvrtc 13.0"),
        cache_key(KernelSource(**{**facts, **other}), none, "nvrtc 13.0"),
        cache_key(KernelSource(**facts), none, "nvrtc 13.2"),
        cache_key(KernelSource(**facts), Headers({"a": "b"}, {}), "nvrtc 13.0"),
        cache_key(KernelSource(**facts), Headers({}, {"a": "b"}), "nvrtc 13.0"),
    }
    assert len(keys) == 5


def test_an_edited_header_is_compiled_again(tmp_path: Path) -> None:
    include = tmp_path / "include" / "megamoe"
    include.mkdir(parents=True)
    source = KernelSource("k", '#include "megamoe/v.cuh"\nextern "C" __global__ void k(int* x) { *x = kValue; }', "k")
    cubins = []
    for value in (1, 2, 1):
        (include / "v.cuh").write_text(f"constexpr int kValue = {value};\n")
        cubins.append(KernelCache(tmp_path / "cache", include_root=include.parent).get(source).cubin)
    assert cubins[0] == cubins[2] != cubins[1]
    assert len(list((tmp_path / "cache").iterdir())) == 2


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def change_report(entry: Path) -> None:
    meta = json.loads((entry / "entry.json").read_text())
    meta["report"]["registers"] += 1
    (entry / "entry.json").write_text(json.dumps(meta))


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: flip_byte(entry / "kernel.cubin"),
        lambda entry: (entry / "kernel.cubin").write_bytes(b""),
        lambda entry: (entry / "kernel.cubin").unlink(),
        lambda entry: (entry / "entry.json").write_text("{"),
        lambda entry: (entry / "entry.json").write_text("[]"),
        lambda entry: (entry / "entry.json").unlink(),
        change_report,
    ],
)
def test_a_damaged_entry_is_replaced(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    good = KernelCache(tmp_path).get(saxpy())
    damage(only_entry(tmp_path))
    assert KernelCache(tmp_path).store.damaged() == [only_entry(tmp_path)]
    again = KernelCache(tmp_path)
    assert again.get(saxpy()).cubin == good.cubin
    assert again.num_compiled == 1
    assert KernelCache(tmp_path).store.damaged() == []
    assert [p for p in tmp_path.iterdir() if p.name.startswith(".megamoe-tmp-")] == []


CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["megamoe.kernels.jit.cache"])  # else each process imports torch


def run_process(target: Callable[..., None], *args: object) -> int | None:
    """Exit status of ``target(*args)`` in a process of its own."""
    process = CONTEXT.Process(target=target, args=args)
    process.start()
    process.join(timeout=120)
    return process.exitcode


def _get_and_report(root: Path, gate: Any, results: Any) -> None:
    cache = KernelCache(root)
    compiler_id("nvrtc")
    gate.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = cache.get(saxpy())
    results.put((compiled.cubin, cache.num_compiled))


def test_eight_processes_start_at_once(tmp_path: Path) -> None:
    gate, results = CONTEXT.Barrier(8), CONTEXT.Queue()
    workers = [CONTEXT.Process(target=_get_and_report, args=(tmp_path, gate, results)) for _ in range(8)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(timeout=30)
        assert worker.exitcode == 0
    assert len({cubin for cubin, _ in found}) == 1
    assert sum(compiled for _, compiled in found) >= 1
    assert [p.name for p in tmp_path.iterdir()] == [only_entry(tmp_path).name]  # nothing half-written stays
    last = KernelCache(tmp_path)
    assert last.get(saxpy()).cubin == found[0][0] and last.num_from_disk == 1


def test_losing_the_race_to_publish_keeps_the_winner(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path)
    compiled = cache.get(saxpy())
    (entry,) = cache.store.entries()
    before = (entry.path / "entry.json").stat().st_mtime_ns
    cache.store.publish(entry.key, saxpy(), entry.compiler, compiled)
    assert (only_entry(tmp_path) / "entry.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_full_or_read_only_disk_costs_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(folder: Path, *rest: object) -> None:
        (folder / "kernel.cubin").write_bytes(b"half of it")
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(store_module, "_write", refuse)
    cache = KernelCache(tmp_path)
    with pytest.warns(RuntimeWarning, match=f"stay in memory.*{os.strerror(code)}") as caught:
        first = cache.get(saxpy())
        cache.get(saxpy(comment="another"))
    assert len(caught) == 1
    assert cache.get(saxpy()) is first
    assert list(tmp_path.iterdir()) == []


def _expect_a_warning(root: Path, sentence: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache = KernelCache(root)
        assert cache.get(saxpy()).cubin and cache.get(saxpy(comment="another")).cubin
    assert len(caught) == 1 and sentence in str(caught[0].message), [str(w.message) for w in caught]


def _with_small_files(root: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # a cubin is larger: its write stops in the middle
    _expect_a_warning(root, "File too large")


def _without_permission(root: Path) -> None:
    compiler_id("nvrtc")  # load libraries while still allowed to
    toolkit_headers()
    if os.geteuid() == 0:
        os.seteuid(65534)
    _expect_a_warning(root, "Permission denied")


def test_a_write_that_stops_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    assert run_process(_with_small_files, tmp_path) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_permission_still_compiles(tmp_path: Path) -> None:
    for folder in tmp_path.parents[:2]:
        folder.chmod(0o755)  # pytest's own are closed to others
    (tmp_path / "locked").mkdir(mode=0o555)
    assert run_process(_without_permission, tmp_path / "locked") == 0
    assert list((tmp_path / "locked").iterdir()) == []


def test_a_cache_that_is_no_folder_still_compiles(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(RuntimeWarning, match="MEGAMOE_CACHE_DIR"):
        assert KernelCache(tmp_path / "file" / "below").get(saxpy()).cubin


def _die_while_publishing(root: Path) -> None:
    def die(path: Path, target: Path) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    os.rename = die  # type: ignore[assignment]
    KernelCache(root).get(saxpy())


def test_a_killed_process_publishes_nothing_and_harms_nobody(tmp_path: Path) -> None:
    assert run_process(_die_while_publishing, tmp_path) == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".megamoe-tmp-")
    cache = KernelCache(tmp_path)
    assert cache.get(saxpy()).cubin and cache.num_compiled == 1
    assert {path.name for path in tmp_path.iterdir()} == {left.name, only_entry(tmp_path).name}


def test_threads_that_want_one_kernel_compile_it_once(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: cache.get(saxpy()), range(8)))
    assert cache.num_compiled == 1 and all(compiled is found[0] for compiled in found)


def test_what_crashes_left_is_swept_and_what_others_are_writing_is_not(tmp_path: Path) -> None:
    old, young = tmp_path / ".megamoe-tmp-dead-1-a", tmp_path / ".megamoe-tmp-alive-1-b"
    foreign = tmp_path / ".tmp-of-another-program"
    for path in (old, young, foreign):
        path.mkdir()
        (path / "kernel.cubin").write_bytes(b"half")
    for path in (old, foreign):
        os.utime(path, (time.time() - 7200,) * 2)
    KernelCache(tmp_path).get(saxpy())
    assert not old.exists() and young.exists() and foreign.exists()


def test_an_entry_that_vanishes_while_read_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    KernelCache(tmp_path).get(saxpy())
    real = Path.read_bytes

    def vanish(path: Path) -> bytes:
        data = real(path)
        if path.name == "entry.json":
            shutil.rmtree(path.parent)
        return data

    monkeypatch.setattr(Path, "read_bytes", vanish)
    cache = KernelCache(tmp_path)
    assert cache.get(saxpy()).cubin and cache.num_compiled == 1


def test_the_folder_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("MEGAMOE_CACHE_DIR", raising=False)
    assert store_module.default_root() == tmp_path / "xdg" / "megamoe"
    monkeypatch.setenv("MEGAMOE_CACHE_DIR", str(tmp_path / "own"))
    assert cache_module.default_cache() is cache_module.default_cache()
    cache_module.default_cache().get(tile())
    assert only_entry(tmp_path / "own").name.startswith("tile-")
