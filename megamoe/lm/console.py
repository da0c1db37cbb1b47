"""What the user sees of a run: on a terminal a progress bar, elsewhere a line now and then; rank 0 alone speaks."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import rich.console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


class Console:
    """Use as a context manager around the training loop.

    Args:
        steps: how many steps make the whole run.
        speaks: False on all ranks but 0: every method then does nothing.
    """

    def __init__(self, *, steps: int, speaks: bool) -> None:
        self.steps = steps
        self.out = rich.console.Console(quiet=not speaks, highlight=False)
        self._progress = Progress(
            TextColumn("[bold]{task.completed:>4}/{task.total}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[loss]}"),
            TextColumn("[dim]{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            console=self.out,
            disable=not (speaks and self.out.is_terminal),
        )
        self._task = self._progress.add_task("", total=steps, loss="", figures="")
        self._smooth: float | None = None

    def __enter__(self) -> Console:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """A line of plain text."""
        self.out.print(escape(text), soft_wrap=True)

    def step(self, step: int, bits: float) -> None:
        """After each step."""
        self._smooth = bits if self._smooth is None else 0.9 * self._smooth + 0.1 * bits
        self._progress.update(self._task, completed=step, loss=f"{self._smooth:.3f} bits/byte")

    def log(self, step: int, bits: float, tokens_per_second: float, load: float) -> None:
        """Each ``log_every`` steps."""
        figures = f"{tokens_per_second:,.0f} tokens/s, expert load max/mean {load:.2f}"
        self._progress.update(self._task, figures=figures)
        if not self.out.is_terminal:
            self.say(f"step {step:>5}/{self.steps}  {bits:.3f} bits/byte  {figures}")

    def held_out(self, step: int, bits: float) -> None:
        """After each measurement on held-out text."""
        self.out.print(f"step {step:>5}/{self.steps}  [bold]{bits:.3f}[/bold] bits/byte on held-out text")

    def summary(self, summary: dict[str, Any], files: list[str]) -> None:
        """The end of a run."""
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_row("held-out text", f"[bold]{summary['held_out_bits_per_byte']:.3f}[/bold] bits/byte")
        table.add_row("  with all experts zeroed", f"{summary['without_experts_bits_per_byte']:.3f} bits/byte")
        table.add_row("  unigram entropy", f"{summary['unigram_bits_per_byte']:.3f} bits/byte")
        if summary["load_max_over_mean"] is not None:
            table.add_row("busiest expert", f"{summary['load_max_over_mean']:.2f} x the mean load")
        for file in files:
            table.add_row("written", escape(file))
        self.out.print(Panel(escape(summary["sample"].rstrip()), title="a sample", title_align="left"))
        self.out.print(table)
