"""The exceptions a user of megamoe can meet beside ValueError (bad input, always with got and expected)."""

from __future__ import annotations


class MegaMoEError(RuntimeError):
    """Base of every run-time failure that megamoe raises itself."""


class PeerTimeout(MegaMoEError):  # noqa: N818 - the name users of the field expect
    """A rank did not arrive within ``MEGAMOE_TIMEOUT_S``; the message names rank, phase, and what was awaited."""


class RankMismatchError(ValueError):
    """The ranks of a group called with arguments that had to be equal and were not; raised on every rank."""


class BufferClosedError(MegaMoEError):
    """A ``SymmBuffer`` (or a view of it) was used after ``close()``."""


class EngineUnavailableError(MegaMoEError):
    """The engine asked for cannot run here; the message says why and what to do."""


class CompileError(MegaMoEError):
    """A kernel did not compile, or compiled to something refused (spills, serialised WGMMA).

    ``log`` is the compiler's whole output, ``listing`` the source with line numbers; the message holds the parts that
    matter.
    """

    def __init__(self, message: str, *, log: str = "", listing: str = "") -> None:
        super().__init__(message)
        self.log = log
        self.listing = listing
