"""Peak memory of `sae-run cache` in processes of their own, for 1x and 10x the data."""

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.results import Ratio, Result

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
    for times in (1, 10):
        n = options.examples * times
        words = ["cache", "model=toy", f"dataset.n_examples={n}", f"outputs={folder}/{times}",
                 "store.window_rows=16384"]  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", CODE, *words], stdout=subprocess.PIPE, text=True, check=True
        )
        peaks[f"{times}x"] = float(done.stdout.split()[-1])
        print(f"{n:>10,} examples: peak {peaks[f'{times}x']:,.0f} MiB")
    ratio = peaks["10x"] / peaks["1x"]
    headline = f"ten times the data: {ratio:.3f}x the peak memory"
    return Result(headline, [Ratio("10x:1x", ratio, "most")], peaks)
