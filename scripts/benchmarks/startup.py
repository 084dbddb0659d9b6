"""Seconds until help is shown, beside the import of torch."""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.results import Ratio, Result, in_turn, spread, times_as_fast


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has none of its own."""


def run(options: argparse.Namespace, folder: Path) -> Result:
    """See the module."""

    def call(*words: str) -> Callable[[], object]:
        return lambda: subprocess.run(words, capture_output=True, check=True, cwd=folder)

    tool = [sys.executable, "-m", "sae_runner"]
    times = in_turn(
        {
            "import torch": call(sys.executable, "-c", "import torch"),
            "sae-run --help": call(*tool, "--help"),
            "sae-run train --help": call(*tool, "train", "--help"),
            "sae-run train --cfg job": call(*tool, "train", "--cfg", "job"),
        },
        options.repeats,
    )
    rows = {}
    print(f"{'':28}{'median':>8}{'min':>8}{'max':>8} ms{'of import torch':>18}")
    for name, seconds in times.items():
        row = rows[name] = spread([1000 * s for s in seconds])
        row |= {"ratio": 1 / times_as_fast(times, name, "import torch"), "seconds": seconds}
        print(
            f"{name:28}{row['median']:>8.0f}{row['min']:>8.0f}{row['max']:>8.0f}"
            f"{row['ratio']:>20.2f}x"
        )
    helped = rows["sae-run train --help"]
    return Result(
        f"`train --help` takes {helped['median'] / 1000:.2f} s",
        [
            Ratio("help_seconds", helped["median"] / 1000, "most"),
            Ratio("help:import_torch", helped["ratio"], "most"),
        ],
        rows,
    )
