"""Real text that every machine has, as bytes: the corpus, its held-out part, and batches that any rank can compute."""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

HELD_OUT_EVERY = 16  # each 16th file (or piece of one) is held out
PIECE_BYTES = 16384  # a text of few files is cut into pieces of this size or less, to hold some of them out


@dataclass(frozen=True)
class Corpus:
    """Two texts as uint8 vectors, and where they come from."""

    train: torch.Tensor
    held_out: torch.Tensor
    source: str

    @property
    def digest(self) -> str:
        """Sixteen hex digits that differ for different texts; ranks compare it before they train together."""
        h = hashlib.sha256()
        for part in (self.train, self.held_out):
            h.update(len(part).to_bytes(8, "little"))
            h.update(part.numpy().tobytes())
        return h.hexdigest()[:16]

    def batch(self, *, step: int, seed: int, sequences: int, length: int) -> torch.Tensor:
        """The global batch of one step: int64 [sequences, length + 1], a function of (seed, step) alone.

        Every rank computes all of it and takes its share, so a run can go on with another number of ranks.
        """
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(len(self.train) - length, (sequences,), generator=generator)
        return self.train[starts[:, None] + torch.arange(length + 1)].long()

    def evaluation(self, *, sequences: int, length: int) -> torch.Tensor:
        """int64 [sequences or fewer, length + 1]: evenly spread, non-overlapping pieces of the held-out text."""
        available = (len(self.held_out) - 1) // length
        take = min(sequences, available)
        starts = torch.arange(take) * available // take * length
        return self.held_out[starts[:, None] + torch.arange(length + 1)].long()


def load_corpus(text: Path | None, *, length: int) -> Corpus:
    """Python's own standard library, or the file or folder ``text`` (of a folder every file, sorted by path).

    Raises:
        ValueError: nothing to read, or not enough of it for sequences of ``length`` bytes.
    """
    if text is None:
        files, source = standard_library(), f"the standard library of Python {sys.version.split()[0]}"
    elif text.is_dir():
        files, source = sorted(p for p in text.rglob("*") if p.is_file()), str(text)
    elif text.is_file():
        files, source = [text], str(text)
    else:
        raise ValueError(f"--text must name a file or a folder, got {str(text)!r}, which does not exist")
    documents = [p.read_bytes() for p in files]
    if len(documents) < HELD_OUT_EVERY:
        size = max(1, min(PIECE_BYTES, sum(map(len, documents)) // (4 * HELD_OUT_EVERY)))
        documents = [d[i : i + size] for d in documents for i in range(0, len(d), size)]
    parts = []
    for name, chosen in (("training", False), ("held-out", True)):
        data = b"".join(d for i, d in enumerate(documents) if (i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) == chosen)
        if len(data) < length + 1:
            raise ValueError(
                f"{source} leaves {len(data)} bytes of {name} text, and a sequence needs {length + 1}: "
                f"give more text with --text, or a smaller --length"
            )
        parts.append(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    train, held_out = parts
    return Corpus(train, held_out, source)


def standard_library() -> list[Path]:
    """Modules of the standard library that are one source file, sorted by name; the same on all machines of a version.

    Raises:
        ValueError: this Python has no sources (some packagings zip or strip them).
    """
    folder = Path(sysconfig.get_path("stdlib"))
    # Build-time data, such as _sysconfigdata, differs per machine and is left out.
    files = sorted(
        p for p in folder.glob("*.py") if p.stem in sys.stdlib_module_names and "sysconfigdata" not in p.stem
    )
    if len(files) < HELD_OUT_EVERY:
        raise ValueError(f"no standard-library sources in {folder} ({len(files)} files): give a text with --text PATH")
    return files


def unigram_bits(data: torch.Tensor) -> float:
    """Entropy of single bytes, bits per byte: what a model reaches that knows the frequencies and no context."""
    p = torch.bincount(data.long(), minlength=256).double() / len(data)
    return float(-(p[p > 0] * p[p > 0].log2()).sum())
