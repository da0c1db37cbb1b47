"""Compiled kernels on disk: one folder an entry, published by rename, verified when read.

``<root>/<name>-<key>/`` holds ``kernel.cubin`` (for cuobjdump, nvdisasm), ``kernel.cu`` (for a reader and profilers)
and ``entry.json`` (ptxas report, log, options, compiler, checksum). Written under a ``.megamoe-tmp-`` name first; the
rename is what publishes, so that readers on this or any other machine see a whole entry or none. Nothing is locked:
ranks that start at once may compile the same kernel, and the first rename wins. A crash leaves a ``.megamoe-tmp-``
folder, swept after an hour, or, after a power cut, an entry whose checksum fails, which counts as absent and is
replaced.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import socket
import time
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamoe import env
from megamoe.kernels.jit.compiler import Compiled
from megamoe.kernels.jit.ptxas import PtxasReport
from megamoe.kernels.jit.source import KernelSource

_TMP = ".megamoe-tmp-"
_ENTRY = re.compile(r".+-[0-9a-f]{32}")  # the folder may be shared with others: touch nothing else
_SWEEP_AFTER_S = 3600.0
_TOUCH_AFTER_S = 86400.0


@dataclass(frozen=True)
class Entry:
    """One entry as ``megamoe cache list`` shows it. ``used``: Unix time of the last use, a day exact."""

    path: Path
    name: str
    key: str
    compiler: str
    arch: str
    report: PtxasReport
    num_bytes: int
    used: float


def default_root() -> Path:
    """Folder of the cache: MEGAMOE_CACHE_DIR, else megamoe/ in XDG_CACHE_HOME or ~/.cache."""
    if folder := env.get("MEGAMOE_CACHE_DIR"):
        return Path(folder)
    base = env.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path(os.path.expanduser("~"), ".cache")) / "megamoe"


class DiskStore:
    """Entries under ``root``. Never raises for what a disk does: a read that fails is a miss, a write a warning."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._writable = True
        self._swept = False

    def path(self, name: str, key: str) -> Path:
        """Folder of an entry, there or not."""
        return self.root / f"{name}-{key[:32]}"

    def load(self, name: str, key: str) -> Compiled | None:
        """The entry, or None if it is absent, unreadable or damaged."""
        path = self.path(name, key)
        compiled = _read(path, key)
        if compiled is not None:
            self._touch(path)
        return compiled

    def publish(self, key: str, source: KernelSource, compiler: str, compiled: Compiled) -> None:
        """Write an entry; on a full or read-only disk warn once and leave it at that."""
        if not self._writable:
            return
        final = self.path(source.name, key)
        tmp = self._tmp()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            if not self._swept:
                self._swept = True
                self.sweep()
            tmp.mkdir()
            _write(tmp, key, source, compiler, compiled)
            self._rename(tmp, final, key)
        except OSError as error:
            self._writable = False
            shutil.rmtree(tmp, ignore_errors=True)
            warnings.warn(
                f"compiled kernels stay in memory and are compiled again by the next process: {self.root} "
                f"cannot be written ({error.strerror or error}); set MEGAMOE_CACHE_DIR to a folder that can",
                RuntimeWarning,
                stacklevel=2,
            )

    def entries(self) -> Iterator[Entry]:
        """Every readable entry, by name. Damaged ones are left out (``damaged`` gives those)."""
        for path in self.folders():
            try:
                meta = json.loads((path / "entry.json").read_bytes())
                size = sum(item.stat().st_size for item in path.iterdir())
                yield Entry(path, meta["name"], meta["key"], meta["compiler"], meta["arch"], _report(meta), size,
                            path.stat().st_mtime)  # fmt: skip
            except (OSError, ValueError, KeyError, TypeError):
                continue

    def damaged(self) -> list[Path]:
        """Entries whose content does not match their checksum."""
        whole = {entry.path for entry in self.entries() if _read(entry.path, entry.key)}
        return [path for path in self.folders() if path not in whole]

    def remove(self, path: Path) -> None:
        """Remove an entry, if it is still there; a process that reads it at this moment sees it whole or a miss."""
        tmp = self._tmp()
        try:
            os.rename(path, tmp)
        except FileNotFoundError:
            return
        shutil.rmtree(tmp, ignore_errors=True)

    def sweep(self, *, older_than_s: float = _SWEEP_AFTER_S) -> None:
        """Remove what crashed processes left half-written."""
        for path in self.root.glob(f"{_TMP}*"):
            try:
                if time.time() - path.stat().st_mtime >= older_than_s:
                    shutil.rmtree(path, ignore_errors=True)
            except OSError:
                continue

    def folders(self) -> list[Path]:
        """Folders of all entries, damaged ones too."""
        try:
            return sorted(p for p in self.root.iterdir() if _ENTRY.fullmatch(p.name) and p.is_dir())
        except OSError:
            return []

    def _tmp(self) -> Path:
        return self.root / f"{_TMP}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:12]}"

    def _rename(self, tmp: Path, final: Path, key: str) -> None:
        try:
            os.rename(tmp, final)
        except OSError:
            if not final.is_dir():
                raise
            if _read(final, key) is None:  # damaged: out of the way with it
                self.remove(final)
                os.rename(tmp, final)
            else:
                shutil.rmtree(tmp, ignore_errors=True)

    @staticmethod
    def _touch(path: Path) -> None:
        """Note the use for ``cache prune``, at most once a day, since metadata writes are dear on a network."""
        try:
            if time.time() - path.stat().st_mtime > _TOUCH_AFTER_S:
                os.utime(path)
        except OSError:
            pass


def _write(folder: Path, key: str, source: KernelSource, compiler: str, compiled: Compiled) -> None:
    meta: dict[str, Any] = {
        "key": key,
        "name": source.name,
        "entry": source.entry,
        "arch": source.arch,
        "options": list(source.options),
        "compiler": compiler,
        "report": dataclasses.asdict(compiled.report),
        "log": compiled.log,
    }
    meta["checksum"] = _checksum(compiled.cubin, meta)
    (folder / "kernel.cubin").write_bytes(compiled.cubin)
    (folder / "kernel.cu").write_text(source.code, encoding="utf-8")
    (folder / "entry.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _read(folder: Path, key: str) -> Compiled | None:
    """The entry in ``folder`` if it is whole and has this key."""
    try:
        meta = json.loads((folder / "entry.json").read_bytes())
        cubin = (folder / "kernel.cubin").read_bytes()
        if meta["key"] != key or meta["checksum"] != _checksum(cubin, meta):
            return None
        return Compiled(cubin, meta["log"], _report(meta))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _checksum(cubin: bytes, meta: dict[str, Any]) -> str:
    """Hash of the machine code and of what is told about it."""
    told = json.dumps({k: v for k, v in meta.items() if k != "checksum"}, sort_keys=True)
    return hashlib.sha256(cubin + b"\0" + told.encode()).hexdigest()


def _report(meta: dict[str, Any]) -> PtxasReport:
    fields = dict(meta["report"])
    return PtxasReport(**{**fields, "codes": tuple(fields["codes"]), "warnings": tuple(fields["warnings"])})
