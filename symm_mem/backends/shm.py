"""``shm``: CPU ranks of one host map one file in shared memory.

The file is unlinked as soon as all ranks have mapped it, so that nothing stays behind however the ranks end. Only a
crash of all ranks within that moment leaves a file; the next allocation in the folder sweeps it.

    page 0: 16 random bytes that tell this file from another of the same name on another host
    page 1 + r * pages: the bytes of rank r
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import shutil
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megamoe import env
from megamoe.errors import MegaMoEError
from megamoe.symm_mem import agree
from megamoe.symm_mem.backends.base import Allocation, Place, several_hosts

_DEFAULT_FOLDER = Path("/dev/shm")
_PREFIX = "megamoe-shm-"
_PAGE = 4096
_TOKEN_BYTES = 16
_STALE_AFTER_S = 60.0


class ShmBackend:
    name = "shm"

    def why_not(self, device: torch.device, group: dist.ProcessGroup | None) -> str | None:
        if device.type != "cpu":
            return f"serves CPU ranks, the device is {device}"
        return None

    def why_not_together(self, device: torch.device, places: Sequence[Place]) -> str | None:
        return several_hosts(places)

    def allocate(self, num_bytes: int, align: int, device: torch.device, group: dist.ProcessGroup | None) -> Allocation:
        assert align <= _PAGE, align
        rank, size = (0, 1) if group is None else (group.rank(), group.size())
        stride = -(-num_bytes // _PAGE) * _PAGE
        total = _PAGE + size * stride
        path, token, owner, problem = None, b"", -1, None
        if rank == 0:
            try:
                path, owner, token = _create(total)
            except OSError as error:
                problem = str(error)
        try:
            # Rank 0 reports its failure here too: nobody waits for a file that never comes.
            path, token, problem = agree.gather(group, (path, token, problem), "the name of the shared-memory file")[0]
            mapped = None
            if path is not None:
                try:
                    mapped = _map(path, total, token)
                except OSError as error:
                    problem = f"{path}: {error}"
            agree.first_problem(group, problem, MegaMoEError)
        finally:
            if path is not None:
                path.unlink(missing_ok=True)  # every rank tries: rank 0 may be the one that died
            if owner >= 0:
                os.close(owner)
        assert mapped is not None
        peers = [mapped[_PAGE + r * stride :][:num_bytes] for r in range(size)]
        return Allocation(rank, peers, release=_nothing)


def sweep(folder: Path) -> list[Path]:
    """Unlink what crashed runs have left in ``folder`` and return it; a file in use is locked by its creator."""
    swept = []
    for path in folder.glob(f"{_PREFIX}*"):
        try:
            if time.time() - path.stat().st_mtime < _STALE_AFTER_S:
                continue  # its creator may stand between creating and locking it
            with open(path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                swept.append(path)
        except OSError:
            continue  # locked, gone, or another user's
    return swept


def room() -> list[tuple[Path, int | None]]:
    """The folders that may hold the file, in the order they are tried, with their free bytes (None: no such folder)."""
    return [(folder, shutil.disk_usage(folder).free if folder.is_dir() else None) for folder in _folders()]


def _folders() -> list[Path]:
    chosen = env.get("MEGAMOE_SHM_DIR")
    if chosen:
        return [Path(chosen)]
    # macOS has no /dev/shm; its temporary folder then is the ordinary place, not worth a warning.
    return [folder for folder in (_DEFAULT_FOLDER, Path(tempfile.gettempdir())) if folder.is_dir()]


def _create(total: int) -> tuple[Path, int, bytes]:
    """A file of ``total`` reserved bytes in the first folder with room: path, descriptor that locks it, token."""
    refusals: list[str] = []
    for folder in _folders():
        sweep(folder)
        try:
            path, descriptor, token = _create_in(folder, total)
        except OSError as error:
            refusals.append(f"{folder}: {error.strerror or error}")
            continue
        if refusals:
            warnings.warn(
                f"symmetric memory of {total} bytes is a file in {folder}, maybe slower ({'; '.join(refusals)}). "
                "MEGAMOE_SHM_DIR chooses the folder; docker run --shm-size enlarges /dev/shm.",
                stacklevel=2,
            )
        return path, descriptor, token
    raise OSError(f"no folder can hold a shared-memory file of {total} bytes: {'; '.join(refusals)}")


def _create_in(folder: Path, total: int) -> tuple[Path, int, bytes]:
    free = shutil.disk_usage(folder).free
    if free < total:
        raise OSError(f"has {free} bytes free, {total} are needed")
    descriptor, name = tempfile.mkstemp(prefix=_PREFIX, dir=folder)  # mode 0600
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if hasattr(os, "posix_fallocate"):
            # Without reserved pages a full file system would end the process by SIGBUS at some later store.
            os.posix_fallocate(descriptor, 0, total)
        else:
            os.ftruncate(descriptor, total)
        token = secrets.token_bytes(_TOKEN_BYTES)
        os.pwrite(descriptor, token, 0)
    except OSError:
        os.unlink(name)
        os.close(descriptor)
        raise
    return Path(name), descriptor, token


def _map(path: Path, total: int, token: bytes) -> torch.Tensor:
    """The file as uint8 [total]; the mapping lives as long as the tensor or a view of it."""
    with open(path, "r+b") as file:
        if file.read(_TOKEN_BYTES) != token:
            raise OSError("this rank sees another file of that name than rank 0; do the ranks share the folder?")
        return torch.frombuffer(mmap.mmap(file.fileno(), total), dtype=torch.uint8)


def _nothing() -> None:
    """The mapping goes with the last view."""
