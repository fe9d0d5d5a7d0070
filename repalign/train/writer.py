"""Where the numbers of a run go: JSON lines, TensorBoard if installed, the terminal."""

import importlib.util
import json
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class MetricsWriter:
    """Appends one JSON object a line to ``metrics.jsonl``; with tensorboardX, event files as well.

    A metric of several replicas is written as a list. A line that a killed run left unfinished is
    removed.

    Args:
        directory: where; None writes nothing (a process whose numbers another one writes).
    """

    def __init__(self, directory: pathlib.Path | None) -> None:
        self._events = self._path = None
        self._file: TextIO | None = None
        if directory is None:
            return
        self._path = directory / "metrics.jsonl"
        if self._path.exists():
            whole = self._path.read_bytes().rfind(b"\n") + 1
            if whole < self._path.stat().st_size:
                os.truncate(self._path, whole)
        self._file = self._path.open("a", buffering=1)
        if importlib.util.find_spec("tensorboardX") is not None:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(directory))

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()

    def read(self, step: int) -> dict[str, Any]:
        """Returns what was written for a step, by this run or an earlier part of it."""
        found: dict[str, Any] = {}
        if self._path is None:
            return found
        for line in self._path.read_text().splitlines():
            entry = json.loads(line)
            if entry.pop("step") == step:
                found |= entry
        return found

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes named scalars (or arrays of replicas) of one step."""
        if self._file is None:
            return
        values = {name: np.asarray(value).tolist() for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._events is not None:
            for name, value in metrics.items():
                for replica, scalar in enumerate(np.atleast_1d(value)):
                    self._events.add_scalar(f"{name}/{replica}", float(scalar), step)


class ProgressReport:
    """Tells a person how far a run is: a bar on a terminal, a plain line now and then elsewhere.

    With ``shown=False`` it says nothing: another process tells the same.
    """

    def __init__(
        self,
        title: str,
        total: int,
        *,
        start: int = 0,
        seconds_between_lines: float = 20,
        shown: bool = True,
    ):
        self._shown = shown
        self._title, self._total, self._start = title, total, start
        self._between, self._begun, self._printed = seconds_between_lines, time.monotonic(), 0.0
        console = Console(stderr=True)
        self._bar = None
        if shown and console.is_terminal and not console.is_dumb_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
            )
            self._task = self._bar.add_task(title, total=total, completed=start, note="")
            self._bar.start()

    def __enter__(self) -> "ProgressReport":
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, *, loss: float, images_per_second: float) -> None:
        """Shows the step, the loss, images/s and the time that is left."""
        note = f"loss {loss:.4g}  {images_per_second:,.0f} images/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, note=note)
            return
        if not self._shown:
            return
        now = time.monotonic()
        if now - self._printed < self._between and step < self._total:
            return
        self._printed = now
        per_step = (now - self._begun) / max(step - self._start, 1)
        print(
            f"{self._title}: step {step}/{self._total}  {note}  "
            f"{per_step * (self._total - step):.0f} s left",
            file=sys.stderr,
            flush=True,
        )
