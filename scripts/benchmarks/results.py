"""Tables of times, the ratios that are made of them, and what machine they are of."""

import os
import platform
import shlex
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from sae_runner import __version__
from sae_runner.kernels import triton_ops
from sae_runner.kernels._native_library import compiler, loaded_level
from sae_runner.kernels.selection import multiplies_bf16

Timed = dict[str, list[float]]
"""Seconds by side, one for each repeat."""


class Ratio(NamedTuple):
    """A number that `--check` can hold to a bound."""

    name: str
    value: float
    bound: Literal["least", "most"]
    """Whether what is asked for is the least or the most that it may be."""

    def misses(self, asked: float) -> bool:
        """Whether it is on the wrong side of what is asked for."""
        return self.value < asked if self.bound == "least" else self.value > asked


@dataclass(frozen=True)
class Result:
    """What a subcommand found."""

    headline: str
    ratios: Sequence[Ratio]
    """The first is the one of the headline, and what a `--check` without a name means."""
    sides: Mapping[str, Any]
    """Rows of the tables, with each repeat."""

    def misses(self, asked: str) -> str | None:
        """What to say of a check (`6` or `native:sparsify=6`) that is missed.

        Raises:
            ValueError: no such ratio, or no number.
        """
        name, _, number = asked.rpartition("=")
        found = [ratio for ratio in self.ratios if ratio.name == name or not name]
        if not found:
            known = ", ".join(ratio.name for ratio in self.ratios)
            raise ValueError(f"--check {asked}: no ratio {name!r}; there are {known}")
        if not found[0].misses(float(number)):
            return None
        return f"{found[0].name} is {found[0].value:.3g}: misses --check {asked}"


def in_turn(sides: Mapping[str, Callable[[], object]], repeats: int) -> Timed:
    """Seconds of each side, measured in turn; the first round warms up and is dropped."""
    times: Timed = {name: [] for name in sides}
    for _ in range(repeats + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            times[name].append(time.perf_counter() - start)
    return {name: seconds[1:] for name, seconds in times.items()}


def times_as_fast(times: Timed, side: str, reference: str) -> float:
    """The median of pairs that were measured one after the other."""
    pairs = zip(times[reference], times[side], strict=True)
    return statistics.median(slow / fast for slow, fast in pairs)


def rates(times: Timed, unit: str, amount: float, reference: str) -> dict[str, Any]:
    """Print and return how much of `amount` each side does in a second, and its spread."""
    print(f"{'':34}{'median':>12}{'min':>12}{'max':>12}{'of ' + reference:>24}")
    rows = {}
    for name, seconds in times.items():
        row = spread([amount / s for s in seconds])
        row |= {"ratio": times_as_fast(times, name, reference), "seconds": seconds}
        print(
            f"{name:34}{row['median']:>12,.0f}{row['min']:>12,.0f}{row['max']:>12,.0f}"
            f"{row['ratio']:>23.2f}x"
        )
        rows[name] = row
    print(f"{'':34}{unit} per second")
    return rows


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the numbers were measured on."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {
        "cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "bf16_matrix_units": multiplies_bf16(torch.device(device)), "gpu": gpu,
        "compiler": compiler_version(), "native_kernels": loaded_level(),
        "triton_kernels": triton_ops.available(), "triton": installed("triton"),
        "platform": platform.platform(), "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if gpu else None, "sae_runner": __version__,
        "malloc": {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")},
    }  # fmt: skip


def machine_line(found: Mapping[str, Any]) -> str:
    """The same in one line."""
    native = found["native_kernels"] or "none"
    return (
        f"{found['gpu'] or found['cpu']}, {found['cores']} cores, {found['threads']} threads, "
        f"torch {found['torch']}, Python {found['python']}, sae_runner {found['sae_runner']}, "
        f"compiler: {found['compiler'] or 'none'}, native kernels: {native}, "
        f"triton {found['triton'] or 'none'}"
    )


def installed(package: str) -> str | None:
    """The version of a package; None where it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor as it calls itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def compiler_version() -> str | None:
    """The first line of what the C++ compiler says of itself; None without one."""
    command = compiler()
    if not command:
        return None
    words = [*command, "--version"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return (done.stdout.splitlines() or [shlex.join(command)])[0]
