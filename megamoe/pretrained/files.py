"""safetensors on disk: tensors of a file or a sharded folder, read one at a time, and a writer of shards.

A folder is laid out as Hugging Face does: ``model.safetensors.index.json`` with a ``weight_map`` from tensor to file. A
file is opened when the first of its tensors is asked for, so that a rank never touches files without its experts.
Format: https://github.com/huggingface/safetensors (8 bytes of header length, a JSON header, the data).
"""

from __future__ import annotations

import json
import math
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megamoe.checkpoint.safetensors import INDEX

_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E8M0": 8, "U8": 8, "I8": 8}
"""Of an element; dtypes that no format of experts uses are safetensors' business."""


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of one tensor; ``dtype`` in safetensors' spelling (BF16, F8_E4M3, U8, ...)."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} in {self.file.name}"


class TensorFiles:
    """The tensors of a ``*.safetensors`` file or a folder of them. Close it, or use it in a ``with`` block.

    Raises:
        ValueError: nothing there that is safetensors; an index that names missing files; later, on use, truncated
            files and tensors that are not where the index says.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._stack = ExitStack()
        self._open: dict[Path, Any] = {}
        self._infos: dict[Path, dict[str, TensorInfo]] = {}
        self._where = self._find()

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all files; tensors read so far stay valid."""
        self._stack.close()
        self._open.clear()

    @property
    def names(self) -> list[str]:
        """All tensors, in the order of the index or file."""
        return list(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype; opens the file that holds the tensor."""
        if name not in self._where:
            raise ValueError(f"{name} is missing in {self.path}")
        file = self._where[name]
        infos = self._headers(file)
        if name not in infos:
            raise ValueError(f"{name} is missing in {file.name}, where {INDEX} says it is")
        return infos[name]

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        """The tensor, or of a stacked one ``tensor[index]`` alone, without reading the rest; on the CPU."""
        info = self.info(name)
        if info.file not in self._open:
            try:
                self._open[info.file] = self._stack.enter_context(safe_open(info.file, framework="pt"))
            except SafetensorError as error:
                raise ValueError(f"{info.file} is no whole safetensors file: {error}") from error
        source = self._open[info.file]
        tensor: torch.Tensor = source.get_tensor(name) if index is None else source.get_slice(name)[index]
        return tensor

    def _find(self) -> dict[str, Path]:
        if self.path.is_file():
            return dict.fromkeys(self._headers(self.path), self.path)
        if not self.path.is_dir():
            raise ValueError(f"{self.path} is neither a safetensors file nor a folder of them")
        index = self.path / INDEX
        if not index.exists():
            files = sorted(self.path.glob("*.safetensors"))
            if len(files) != 1:
                raise ValueError(f"{self.path} has no {INDEX}, and not one safetensors file but {len(files)}")
            return dict.fromkeys(self._headers(files[0]), files[0])
        try:
            where = {str(n): self.path / str(f) for n, f in json.loads(index.read_text())["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is no index of safetensors files: {type(error).__name__}: {error}") from error
        for name, file in where.items():
            if file.parent != self.path:
                raise ValueError(f"{index} says {name} is in {file}, outside its folder")
        return where

    def _headers(self, file: Path) -> dict[str, TensorInfo]:
        if file not in self._infos:
            self._infos[file] = read_header(file)
        return self._infos[file]


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Every tensor of one file, from its header; sees to it that the file is as long as the header says.

    safetensors refuses broken files as well, but names neither file nor tensor.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > size - 8:
                raise ValueError(f"{file} is truncated in its header: {length} bytes announced, {size} bytes in all")
            header = json.loads(stream.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
                begin, end = map(int, entry["data_offsets"])
                if 8 + length + end > size:
                    raise ValueError(f"{file} is truncated: {name} ends at byte {8 + length + end}, the file at {size}")
                bits = _BITS.get(entry["dtype"], 0) * math.prod(entry["shape"])
                if bits and bits != 8 * (end - begin):
                    raise ValueError(
                        f"{name} in {file} is mislabelled: {entry['dtype']} {entry['shape']} has {bits // 8} bytes, "
                        f"its place {end - begin}"
                    )
            return {n: TensorInfo(n, file, str(e["dtype"]), tuple(map(int, e["shape"]))) for n, e in entries.items()}
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from error
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is no safetensors file: {type(error).__name__}: {error}") from error


class ShardWriter:
    """Collects tensors into files of at most ``shard_bytes`` (or one tensor), then writes the index; nothing is a
    checkpoint before ``finish``.

    Raises:
        ValueError: the folder already holds a checkpoint.
    """

    def __init__(self, folder: str | os.PathLike[str], *, shard_bytes: int = 5 << 30) -> None:
        self.folder = Path(folder)
        if (self.folder / INDEX).exists() or any(self.folder.glob("*.safetensors")):
            raise ValueError(f"{self.folder} already holds a checkpoint; write each into a folder of its own")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.shard_bytes = shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """One tensor, kept in memory until its shard is full."""
        num_bytes = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + num_bytes > self.shard_bytes:
            self._flush()
        # A view of a larger storage must not drag all of it along, and two names must not share one.
        self._pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._pending_bytes += num_bytes
        self._total += num_bytes

    def finish(self, metadata: dict[str, str] | None = None) -> int:
        """Write what is left, name the shards, write the index; bytes of all tensors."""
        self._flush()
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            file = f"model-{number + 1:05d}-of-{len(self._shards):05d}.safetensors"
            os.replace(self._partial(number), self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {**(metadata or {}), "total_size": self._total}, "weight_map": weight_map}
        partial = self.folder / f".{INDEX}.partial"
        partial.write_text(json.dumps(index, indent=1, sort_keys=True))
        os.replace(partial, self.folder / INDEX)
        return self._total

    def abandon(self) -> None:
        """Remove what was written so far."""
        for number in range(len(self._shards)):
            self._partial(number).unlink(missing_ok=True)

    def _flush(self) -> None:
        if self._pending:
            save_file(self._pending, self._partial(len(self._shards)), {"format": "pt"})
            self._shards.append(list(self._pending))
            self._pending, self._pending_bytes = {}, 0

    def _partial(self, number: int) -> Path:
        return self.folder / f".model-{number + 1:05d}.partial"
