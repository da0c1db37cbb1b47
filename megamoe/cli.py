"""``python -m megamoe``: one sub-command a module in ``megamoe.commands``; each offers ``add(subparsers)``."""

from __future__ import annotations

import argparse
import importlib
import sys

COMMANDS = ("doctor", "plan", "bench", "cache")


def main(argv: list[str] | None = None) -> int:
    """Parse ``argv`` and run the sub-command; bad input ends in one sentence on stderr and status 2."""
    parser = argparse.ArgumentParser(prog="megamoe", description=__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name in COMMANDS:
        try:
            module = importlib.import_module(f"megamoe.commands.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"megamoe.commands.{name}":
                raise
            continue
        module.add(subparsers)
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments) or 0)
    except ValueError as error:
        print(f"megamoe {arguments.command}: {error}", file=sys.stderr)
        return 2
