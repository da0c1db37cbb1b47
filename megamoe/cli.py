"""``python -m megamoe``: one sub-command a module in ``megamoe.commands``; each offers ``add(subparsers)``."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import NoReturn

from megamoe.errors import MegaMoEError
from megamoe.leave import leave

COMMANDS = ("doctor", "plan", "bench", "trace", "cache", "convert")


def main(argv: list[str] | None = None) -> int:
    """Parse ``argv`` and run the sub-command.

    Returns:
        what the sub-command returns (None counts as 0); 2 after bad input, 1 after anything else that megamoe itself
        gives up on, both with one sentence on stderr.
    """
    description = "Look at what this machine can run, plan and measure layers, manage kernels, convert checkpoints."
    parser = argparse.ArgumentParser(prog="megamoe", description=description)
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name in COMMANDS:
        importlib.import_module(f"megamoe.commands.{name}").add(subparsers)
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments) or 0)
    except (ValueError, MegaMoEError) as error:
        print(f"megamoe {arguments.command}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


def program() -> NoReturn:
    """``megamoe`` and ``python -m megamoe``: ``main``, and the end of the process."""
    leave(main)
