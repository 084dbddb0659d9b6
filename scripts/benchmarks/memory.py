"""Peak memory of `sae-run cache` in processes of their own, for 1x and 10x the data.

The larger data are cached once: that takes ten times as long.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.results import Ratio, Result, spread

CODE = """
import sys
from sae_runner.cli import main
from sae_runner.meters import peak_rss_mib
main()
print(peak_rss_mib())
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its own options."""
    parser.add_argument("--examples", type=int, default=40_000, help="of the smaller data")


def run(options: argparse.Namespace, folder: Path) -> Result:
    """See the module."""
    peaks = {}
    print(f"{'examples':>12}{'median':>10}{'min':>10}{'max':>10} MiB")
    for times, repeats in ((1, options.repeats), (10, 1)):
        n = options.examples * times
        found = [peak(n, folder / f"{times}x{i}") for i in range(repeats)]
        row = peaks[f"{times}x"] = spread(found)
        print(f"{n:>12,}{row['median']:>10,.0f}{row['min']:>10,.0f}{row['max']:>10,.0f}")
    ratio = peaks["10x"]["median"] / peaks["1x"]["median"]
    headline = f"ten times the data: {ratio:.3f}x the peak memory"
    return Result(headline, [Ratio("10x:1x", ratio, "most")], peaks)


def peak(n: int, folder: Path) -> float:
    """MiB at most of a process that caches n examples."""
    words = ["cache", "model=toy", f"dataset.n_examples={n}", f"outputs={folder}",
             "store.window_rows=16384"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", CODE, *words], stdout=subprocess.PIPE, text=True, check=True
    )
    return float(done.stdout.split()[-1])
