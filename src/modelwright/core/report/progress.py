"""Progress on standard error: bars on a terminal, one line per task elsewhere, nothing when silent."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Tick:
    """Call with an increment, or `to(done, total)`."""

    def __call__(self, n: int) -> None:
        """Advance by n."""

    def to(self, done: int, total: int) -> None:
        """Set the position."""

    def say(self, numbers: dict[str, Any]) -> None:
        """Show numbers beside the bar: loss, lr, grad_norm, tokens_per_second, seconds_left."""


def in_words(numbers: dict[str, Any]) -> str:
    """One line of a training run's numbers."""
    norm = numbers.get("grad_norm")
    parts = [f"step {numbers['step']}", f"loss {numbers['loss']:.4f}", f"lr {numbers['lr']:.2e}"]
    parts += [f"grad {norm:.2f}"] if norm is not None else []
    return "  ".join([*parts, f"{numbers['tokens_per_second']:,.0f} tokens/s", f"{numbers['seconds_left']:.0f} s left"])


class _Line(Tick):
    """A line every few seconds."""

    def __init__(self, name: str):
        self.name, self.last = name, time.perf_counter()

    def say(self, numbers: dict[str, Any]) -> None:
        if time.perf_counter() - self.last >= 5:
            self.last = time.perf_counter()
            print(f"{self.name}  {in_words(numbers)}", file=sys.stderr, flush=True)


class Silent:
    """No output."""

    @contextmanager
    def task(self, name: str, total: float | None = None) -> Iterator[Tick]:
        yield Tick()


Progress = Silent


class Lines(Silent):
    """One line per finished task, for logs."""

    @contextmanager
    def task(self, name: str, total: float | None = None) -> Iterator[Tick]:
        began = time.perf_counter()
        yield _Line(name)
        print(f"{name}  {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)


class _Bar(Tick):
    def __init__(self, bars: Any, task: Any, name: str):
        self.bars, self.id, self.name = bars, task, name

    def __call__(self, n: int) -> None:
        self.bars.advance(self.id, n)

    def to(self, done: int, total: int) -> None:
        self.bars.update(self.id, completed=done, total=total)

    def say(self, numbers: dict[str, Any]) -> None:
        self.bars.update(self.id, description=f"{self.name}  {in_words(numbers)}")


class Bars(Silent):
    """rich progress bars."""

    def __init__(self, console: Any):
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._depth = 0

    @contextmanager
    def task(self, name: str, total: float | None = None) -> Iterator[Tick]:
        if self._depth == 0:
            self._bars.start()
        self._depth += 1
        task = self._bars.add_task(name, total=total)
        try:
            yield _Bar(self._bars, task, name)
            self._bars.update(task, total=1, completed=1)
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._bars.stop()
                for t in list(self._bars.task_ids):
                    self._bars.remove_task(t)


def choose(quiet: bool = False) -> Silent:
    """Bars on a terminal, lines elsewhere, silent when asked."""
    if quiet:
        return Silent()
    if not sys.stderr.isatty():
        return Lines()
    from rich.console import Console

    return Bars(Console(stderr=True))
