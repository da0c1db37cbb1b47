"""``KernelCache``: memory, then disk, then the compiler."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import defaultdict
from functools import cache
from pathlib import Path

from megamoe.kernels.jit.compiler import (
    COMMON_OPTIONS,
    Compiled,
    CompilerKind,
    chosen_compiler,
    compile_source,
    compiler_id,
    toolkit_headers,
)
from megamoe.kernels.jit.source import INCLUDE_ROOT, Headers, KernelSource, reached_headers
from megamoe.kernels.jit.store import DiskStore, default_root

_FORMAT = 1  # raise when the meaning of an entry on disk changes


def cache_key(source: KernelSource, headers: Headers, compiler: str) -> str:
    """Hash of everything that decides the machine code."""
    facts = [_FORMAT, source.name, source.code, source.entry, COMMON_OPTIONS, source.options, source.arch, compiler]
    return hashlib.sha256(json.dumps([*facts, headers.digest()]).encode()).hexdigest()


class KernelCache:
    """Compiled kernels by source. Threads may share one; two that want the same kernel compile it once.

    Headers are read when a source is first asked for; an edit after that shows in the next process.
    """

    def __init__(self, root: Path | None = None, *, include_root: Path = INCLUDE_ROOT) -> None:
        self.store = DiskStore(root or default_root())
        self.include_root = include_root
        self.num_compiled = 0
        self.num_from_disk = 0
        self._memory: dict[tuple[KernelSource, str], Compiled] = {}
        self._locks: defaultdict[tuple[KernelSource, str], threading.Lock] = defaultdict(threading.Lock)

    def get(self, source: KernelSource, *, kind: CompilerKind | None = None) -> Compiled:
        """``source`` compiled. Raises CompileError, or EngineUnavailableError if the compiler is missing."""
        kind = kind or chosen_compiler()
        if (found := self._memory.get((source, kind))) is not None:
            return found
        with self._locks[source, kind]:
            if (found := self._memory.get((source, kind))) is None:
                found = self._memory[source, kind] = self._fetch(source, kind)
            return found

    def _fetch(self, source: KernelSource, kind: CompilerKind) -> Compiled:
        headers = reached_headers(source.code, root=self.include_root, toolkit_root=toolkit_headers())
        compiler = compiler_id(kind)
        key = cache_key(source, headers, compiler)
        if (found := self.store.load(source.name, key)) is not None:
            self.num_from_disk += 1
            return found
        compiled = compile_source(source, kind=kind, headers=headers)
        self.num_compiled += 1
        self.store.publish(key, source, compiler, compiled)
        return compiled


@cache
def _cache_at(root: Path) -> KernelCache:
    return KernelCache(root)


def default_cache() -> KernelCache:
    """The cache of this process at the folder that the environment names."""
    return _cache_at(default_root())
