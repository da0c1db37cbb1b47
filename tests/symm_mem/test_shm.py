"""The shm backend's file: gone whatever happens, and somewhere else when /dev/shm is small."""

from __future__ import annotations

import errno
import os
import signal
import sys
import tempfile
import warnings
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from megamoe.errors import MegaMoEError, PeerTimeout
from megamoe.symm_mem import agree
from megamoe.symm_mem.arena import Arena, Field
from megamoe.symm_mem.backends import shm
from megamoe.symm_mem.buffer import SymmBuffer
from megamoe.testing.ranks import RankDied, spawn_ranks

ARENA = Arena(Field("x", (1 << 16,), torch.float32))
_Usage = namedtuple("_Usage", "total used free")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGAMOE_SHM_DIR", str(tmp_path))
    return tmp_path


def _files_seen(rank, world_size, group, folder):
    with SymmBuffer.create(ARENA, device="cpu", group=group) as buffer:
        seen = list(folder.iterdir())
        buffer.peer(0)["x"][rank] = rank + 1.0
        agree.barrier(group, "test")
        return seen, buffer["x"][:world_size].tolist()


def test_the_file_is_gone_while_the_buffer_is_in_use(ranks, folder):
    results = ranks(3).run(_files_seen, folder)
    assert [seen for seen, _ in results] == [[]] * 3
    assert results[0][1] == [1.0, 2.0, 3.0]


def _killed_later(rank, world_size, group):
    buffer = SymmBuffer.create(ARENA, device="cpu", group=group)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(PeerTimeout, match="for rank 1 at test"):
        agree.barrier(group, "test")
    buffer.peer(1)["x"].fill_(3)  # the dead rank's memory is still there
    return buffer.peer(1)["x"].sum().item()


def _killed_while_mapping(rank, world_size, group, victims):
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    if rank in victims:
        shm._map = die
    SymmBuffer.create(ARENA, device="cpu", group=group)


def test_a_rank_killed_in_use_leaves_no_file(folder, monkeypatch):
    monkeypatch.setenv("MEGAMOE_TIMEOUT_S", "1")
    first, second = spawn_ranks(2, _killed_later)
    assert isinstance(second, RankDied) and first == 3 * (1 << 16)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_while_mapping_leaves_no_file(folder, monkeypatch, victim):
    monkeypatch.setenv("MEGAMOE_TIMEOUT_S", "1")
    outcomes = spawn_ranks(2, _killed_while_mapping, [victim])
    assert isinstance(outcomes[victim], RankDied)
    assert isinstance(outcomes[1 - victim], PeerTimeout), outcomes[1 - victim]
    assert list(folder.iterdir()) == []


def test_what_all_ranks_killed_at_once_leave_is_swept(ranks, folder, monkeypatch):
    assert all(isinstance(o, RankDied) for o in spawn_ranks(2, _killed_while_mapping, [0, 1]))
    (left,) = folder.iterdir()
    ranks(2).run(_files_seen, folder)
    assert list(folder.iterdir()) == [left], "too young to be judged"
    os.utime(left, (0, 0))
    ranks(2).run(_files_seen, folder)
    assert list(folder.iterdir()) == []


def test_sweep_spares_files_in_use_and_of_others(tmp_path):
    path, descriptor, _ = shm._create_in(tmp_path, 8192)
    other = tmp_path / "something-else"
    other.write_text("")
    for file in (path, other):
        os.utime(file, (0, 0))
    assert shm.sweep(tmp_path) == [] and path.exists()
    os.close(descriptor)
    assert shm.sweep(tmp_path) == [path] and list(tmp_path.iterdir()) == [other]


def _small_default(rank, world_size, group, folders, how):
    """The first of ``folders`` stands for a 64 MB /dev/shm, which either says that it is full or turns out to be."""
    small, fallback = folders
    shm._DEFAULT_FOLDER = small
    tempfile.tempdir = str(fallback)
    reserve, usage = os.posix_fallocate, shm.shutil.disk_usage

    def full(descriptor, offset, total):
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).parent == small:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(descriptor, offset, total)

    if how == "fills up":
        os.posix_fallocate = full
    else:
        shm.shutil.disk_usage = lambda folder: _Usage(64 << 20, 64 << 20, 4096) if folder == small else usage(folder)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with SymmBuffer.create(ARENA, device="cpu", group=group) as buffer:
                buffer.peer((rank + 1) % world_size)["x"].fill_(rank + 1)
                agree.barrier(group, "test")
                return [str(w.message) for w in caught], buffer["x"].unique().tolist()
    finally:
        os.posix_fallocate, shm.shutil.disk_usage = reserve, usage


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and only Linux has a /dev/shm to be small")
@pytest.mark.parametrize(
    ("how", "reason"), [("fills up", "No space left on device"), ("is full", r"has 4096 bytes free, 528384 are needed")]
)
def test_a_small_dev_shm_is_met_with_another_folder_and_a_sentence(tmp_path, how, reason):
    small, fallback = tmp_path / "shm", tmp_path / "tmp"
    small.mkdir()
    fallback.mkdir()
    (told, first), (silent, second) = spawn_ranks(2, _small_default, (small, fallback), how)
    assert (first, second, silent) == ([2.0], [1.0], [])
    (sentence,) = told
    assert f"is a file in {fallback}" in sentence and f"{small}: " in sentence and "MEGAMOE_SHM_DIR" in sentence
    assert reason in sentence
    assert list(small.iterdir()) == list(fallback.iterdir()) == []


def _nowhere(rank, world_size, group, folder):
    with pytest.raises(MegaMoEError) as info:
        SymmBuffer.create(ARENA, device="cpu", group=group)
    os.environ["MEGAMOE_SHM_DIR"] = str(folder)
    SymmBuffer.create(ARENA, device="cpu", group=group).close()  # the next correct call works
    return str(info.value)


def test_no_folder_at_all_is_an_error_on_every_rank(ranks, folder, monkeypatch):
    monkeypatch.setenv("MEGAMOE_SHM_DIR", str(folder / "missing"))
    told = ranks(2).run(_nowhere, folder)
    assert told[0] == told[1]
    assert f"no folder can hold a shared-memory file of 528384 bytes: {folder}/missing: No such file" in told[0]


def _another_file(rank, world_size, group):
    if rank == 1:  # as in a container with a /dev/shm of its own
        mapped = shm._map
        shm._map = lambda path, total, token: mapped(path, total, b"x" * 16)
        try:
            with pytest.raises(MegaMoEError, match=r"rank 1 of 2: .*another file of that name"):
                SymmBuffer.create(ARENA, device="cpu", group=group)
        finally:
            shm._map = mapped
    else:
        with pytest.raises(MegaMoEError, match=r"rank 1 of 2: .*another file of that name"):
            SymmBuffer.create(ARENA, device="cpu", group=group)
    SymmBuffer.create(ARENA, device="cpu", group=group).close()


def test_ranks_that_do_not_share_the_folder_are_told(ranks, folder):
    ranks(2).run(_another_file)
    assert list(folder.iterdir()) == []
