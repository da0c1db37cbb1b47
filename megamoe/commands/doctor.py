"""``python -m megamoe doctor``: what this machine can run, each thing with ok, why not, and what to do."""

from __future__ import annotations

import argparse
import dataclasses
import json

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megamoe import diagnostics
from megamoe.diagnostics import Finding

MARKS = {True: Text("ok", style="green"), False: Text("no", style="red"), None: Text("-", style="dim")}


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser("doctor", help="what this machine can run, and why not", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    parser.set_defaults(run=run)


def table(findings: list[Finding]) -> Table:
    """One line a finding, the advice in a line of its own below it, a gap between sections."""
    result = Table(box=None, pad_edge=False, show_header=False)
    section = ""
    for finding in findings:
        if section and finding.section != section:
            result.add_row()
        title = finding.section if finding.section != section else ""
        section = finding.section
        # Text, not str: brackets in a sentence are not markup.
        found = Text(finding.detail)
        if finding.advice:
            found.append(f"\n-> {finding.advice}", style="dim" if finding.ok is None else "yellow")
        result.add_row(Text(title, style="bold"), Text(finding.name), MARKS[finding.ok], found)
    return result


def run(arguments: argparse.Namespace) -> int:
    """Print the findings; a machine that lacks something is not an error, so the status is 0."""
    findings = diagnostics.examine()
    if arguments.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    else:
        Console().print(table(findings))
    return 0
