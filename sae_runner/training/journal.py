"""metrics.jsonl and timings.jsonl of a run: what it learned, and what clocks and meters said."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from sae_runner import files
from sae_runner.meters import peak_rss_mib

LogSink = Callable[[dict[str, float]], None]
FILES = ("metrics.jsonl", "timings.jsonl")


class Journal:
    """Appends lines to the files of one run and hands metrics on to loggers."""

    def __init__(self, run_dir: Path, batch_size: int, sinks: tuple[LogSink, ...]) -> None:
        self.run_dir, self.batch_size, self.sinks = run_dir, batch_size, sinks
        self.begin(0)

    def begin(self, step: int) -> None:
        """Start the clock at a step."""
        self.step, self.at, self.wait_s = step, time.perf_counter(), 0.0

    def metrics(self, row: dict[str, float]) -> None:
        """One line of metrics.jsonl."""
        self._append("metrics.jsonl", row)
        for sink in self.sinks:
            sink(row)

    def timings(self, step: int, wait_s: float) -> None:
        """One line of timings.jsonl for the steps since the last.

        `wait_s` is how long training has waited for batches since it began.
        """
        now = time.perf_counter()
        n_steps, seconds = step - self.step, max(now - self.at, 1e-9)
        if n_steps > 0:
            row = {
                "step": step,
                "rows_per_s": round(n_steps * self.batch_size / seconds, 1),
                "wait_fraction": round((wait_s - self.wait_s) / seconds, 4),
                "wall_s": round(seconds, 3),
                "peak_rss_mib": peak_rss_mib(),
            }
            self._append("timings.jsonl", row)
        self.step, self.at, self.wait_s = step, now, wait_s

    def _append(self, name: str, row: Mapping[str, float]) -> None:
        with (self.run_dir / name).open("a") as file:
            file.write(json.dumps(row) + "\n")

    def flush(self) -> None:
        """Bring what was written to the disk."""
        for name in FILES:
            if (self.run_dir / name).is_file():
                files.flush(self.run_dir / name)

    def go_back_to(self, step: int) -> None:
        """Forget what was logged after a step."""
        for path in (self.run_dir / name for name in FILES):
            if path.is_file():
                lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
                kept = [line for line in lines if json.loads(line)["step"] <= step]
                files.write_text(path, "".join(line + "\n" for line in kept))
