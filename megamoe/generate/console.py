"""What the user sees: a bar while tokens come, then a table and the texts; rank 0 alone speaks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import rich.console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from megamoe.generate.loop import Record
from megamoe.generate.measure import Figures


class Console:
    """``speaks`` False on all ranks but 0: every method then does nothing."""

    def __init__(self, *, speaks: bool) -> None:
        self.out = rich.console.Console(quiet=not speaks, highlight=False)
        self.speaks = speaks

    def say(self, text: str) -> None:
        """A line of plain text."""
        self.out.print(escape(text), soft_wrap=True)

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[Record], None]]:
        """Call the result with each step's record; ``total`` new tokens are expected on this rank."""
        with Progress(
            TextColumn(escape(what)),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total} tokens, {task.fields[rows]} running"),
            TimeRemainingColumn(compact=True),
            console=self.out,
            disable=not (self.speaks and self.out.is_terminal),
            transient=True,
        ) as bar:
            task = bar.add_task("", total=total, rows=0)
            yield lambda record: bar.update(task, advance=record.requests, rows=record.requests)

    def ran(self, experts: str, batch: int, warm_up_s: float, f: Figures) -> None:
        """One run, as soon as it is over."""
        latency = "" if f.us is None else f", decode steps of {f.us / 1000:.2f} ms"
        self.say(
            f"{experts}, batch {batch}: {f.new_tokens} tokens in {f.seconds:.1f} s, {f.tokens_per_second:,.1f} "
            f"tokens/s{latency}; warmed up in {warm_up_s:.1f} s."
        )

    def figures(self, rows: list[tuple[str, int, Figures]]) -> None:
        """One line for each run: (experts, batch, figures)."""
        table = Table(box=None, padding=(0, 2, 0, 0))
        for name in ("experts", "batch a rank", "requests", "new tokens/s", "decode ms p50", "p90", "p99"):
            table.add_column(name, justify="left" if name == "experts" else "right")
        for experts, batch, f in rows:
            latencies = [("" if us is None else f"{us / 1000:.2f}") for us in (f.us, f.us_p90, f.us_p99)]
            table.add_row(experts, str(batch), str(f.requests), f"{f.tokens_per_second:,.1f}", *latencies)
        self.out.print(table)

    def text(self, prompt: str, answer: str) -> None:
        """One request that came as text."""
        self.out.print(Panel(escape(answer.rstrip()), title=escape(prompt[:80]), title_align="left"))
