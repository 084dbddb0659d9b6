"""Measure this tool on this machine, each number beside a reference in the same run.

    python scripts/benchmark.py step       a TopK training step against dense PyTorch and sparsify's
    python scripts/benchmark.py store      shuffled reading against raw and a DataLoader; waiting
    python scripts/benchmark.py cache      caching against a bare loop of the same forwards
    python scripts/benchmark.py memory     peak memory of caching 1x and 10x the data
    python scripts/benchmark.py eval       rows a second and peak memory of the evaluators
    python scripts/benchmark.py startup    --help and completion
    python scripts/benchmark.py together   8 SAEs over one stream against 8 runs in a row
    python scripts/benchmark.py curves     a training by the dense definition and by the fast paths

Every subcommand prints medians, minima, maxima and ratios (medians of pairs measured in turn, so
that a noisy machine does not favour either side), and writes JSON with `--out FILE`. `--check R`
exits with 1 when the ratio of the last line is worse than R; `--check NAME=R`, as often as wanted,
holds any of the ratios that are listed. `SUBCOMMAND --help` says what is compared with what.

To measure another library beside it: install it, add a class with `step(x)` that runs its own step
to `SIDES` in `benchmarks/step_sides.py`, and name it in `step --sides dense,mine,native-screened`.
It then has the same batches, shapes, threads and allocator, and a process of its own.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from benchmarks import (
    cache,
    curves,
    evaluating,
    memory,
    startup,
    step,
    store,
    together,
)
from benchmarks.results import machine, machine_line

from sae_runner import files
from sae_runner.allocator import keep_pages
from sae_runner.meters import peak_rss_mib

WHAT: dict[str, ModuleType] = {
    "step": step, "store": store, "cache": cache, "memory": memory, "eval": evaluating,
    "startup": startup, "together": together, "curves": curves,
}  # fmt: skip


def main() -> None:
    """Run one subcommand."""
    keep_pages()  # As in `sae-run`, for whatever is compared.
    options, words = arguments()
    options.overrides = words
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = WHAT[options.what].run(options, Path(folder))
    found = machine(getattr(options, "device", "cpu"))
    found["peak_mib"] = peak_rss_mib()
    print(f"\n{machine_line(found)}")
    print(f"peak memory of this process: {found['peak_mib']:,.0f} MiB")
    print("ratios: " + ", ".join(f"{ratio.name}={ratio.value:.3g}" for ratio in result.ratios))
    print(result.headline)
    if options.out:
        asked = {key: str(value) for key, value in vars(options).items()}
        ratios = {ratio.name: ratio.value for ratio in result.ratios}
        files.write_json(
            options.out,
            {
                "benchmark": options.what, "options": asked, "machine": found,
                "headline": result.headline, "ratios": ratios, "sides": result.sides,
            },
        )  # fmt: skip
    try:
        missed = [text for asked in options.check if (text := result.misses(asked))]
    except ValueError as error:
        sys.exit(str(error))
    if missed:
        sys.exit("\n".join(missed))


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """The subcommand with its options, and `key=value` words where it takes some."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="what", required=True)
    for name, module in WHAT.items():
        described = (module.__doc__ or "").strip()
        own = commands.add_parser(
            name, help=described.splitlines()[0], description=described,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        own.add_argument("--repeats", type=int, default=5)
        own.add_argument("--folder", default=None, help="where to write (default: temporary)")
        own.add_argument("--out", type=Path, help="JSON file")
        own.add_argument("--check", action="append", default=[], metavar="[NAME=]RATIO")
        module.add_arguments(own)
    options, words = parser.parse_known_args()
    if strange := [word for word in words if word.startswith("-") or "=" not in word]:
        parser.error(f"unknown: {' '.join(strange)}")
    if words and options.what not in ("cache", "curves"):
        parser.error(f"{options.what} takes no {words[0]}")
    return options, words


if __name__ == "__main__":
    main()
