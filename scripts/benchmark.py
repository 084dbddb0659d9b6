"""Measure this tool on this machine, each number beside a reference in the same run.

    python scripts/benchmark.py store              shuffled reading against raw and a DataLoader
    python scripts/benchmark.py cache              caching against a bare loop of the same forwards
    python scripts/benchmark.py memory             peak memory of caching 1x and 10x the data
    python scripts/benchmark.py startup            --help and completion
    python scripts/benchmark.py together           8 SAEs over one stream against 8 runs in a row

Every subcommand prints medians, minima, maxima and ratios (medians of pairs measured in turn, so
that a noisy machine does not favour either side), and writes JSON with `--out FILE`. `--check R`
exits with 1 when the ratio named in the last line is worse than R.
"""

import argparse
import itertools
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae_runner import __version__, files
from sae_runner.commands.pipeline import Pipeline
from sae_runner.composition import composed_jobs
from sae_runner.config import construct, preset
from sae_runner.data.base import SPLITS
from sae_runner.models.base import SiteInfo
from sae_runner.saes import SAES
from sae_runner.site import TokenSelection
from sae_runner.store.loading import load_batches
from sae_runner.store.manifest import selection_dir, site_to_json
from sae_runner.store.prefetch import Prefetched
from sae_runner.store.reader import ActivationStore
from sae_runner.store.window import WindowPlan, WindowRows
from sae_runner.store.writer import _finish, _write_window, write_selections
from sae_runner.training.together import run_together
from sae_runner.training.trainer import Trainer, TrainOptions

Timed = dict[str, list[float]]


def main() -> None:
    """Run one subcommand."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["store", "cache", "memory", "startup", "together"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=393_216, help="store: rows of the store")
    parser.add_argument("--d", type=int, default=768, help="store: width of a row")
    parser.add_argument("--examples", type=int, default=2048, help="cache: examples")
    parser.add_argument("--model", default="minilm", help="cache: model option")
    parser.add_argument("overrides", nargs="*", help="cache: further key=value words")
    parser.add_argument("--folder", default=None, help="where to write (default: a temporary one)")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--check", type=float, help="exit with 1 when the ratio is worse")
    options = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = globals()[f"bench_{options.what}"](options, Path(folder))
    result["machine"] = machine()
    print(f"\n{result['headline']}")
    if options.out:
        files.write_json(options.out, result)
    if options.check is not None and not result["better"](result["ratio"], options.check):
        sys.exit(f"ratio {result['ratio']:.3g} misses --check {options.check:g}")


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "platform": platform.platform(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "sae_runner": __version__, "python": platform.python_version(),
    }  # fmt: skip


def in_turn(sides: dict[str, Callable[[], None]], repeats: int) -> Timed:
    """Seconds of each side, measured in turn; the first round warms up and is dropped."""
    times: Timed = {name: [] for name in sides}
    for _ in range(repeats + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            times[name].append(time.perf_counter() - start)
    return {name: seconds[1:] for name, seconds in times.items()}


def table(times: Timed, unit: str, amount: float, reference: str) -> dict[str, Any]:
    """Print and return rate, spread and ratio to the reference for each side."""
    print(f"{'':34}{'median':>12}{'min':>12}{'max':>12}{'of ' + reference:>14}")
    rows = {}
    for name, seconds in times.items():
        rates = [amount / s for s in seconds]
        pairs = [r / s for r, s in zip(times[reference], seconds, strict=True)]
        row = {
            "median": statistics.median(rates), "min": min(rates), "max": max(rates),
            "ratio": statistics.median(pairs), "seconds": seconds,
        }  # fmt: skip
        print(
            f"{name:34}{row['median']:>12,.0f}{row['min']:>12,.0f}{row['max']:>12,.0f}"
            f"{row['ratio']:>13.2f}x"
        )
        rows[name] = row
    print(f"{'':34}{unit} per second")
    return rows


# -- store -------------------------------------------------------------------------------------


def bench_store(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Read shuffled batches of 4,096 rows: ours, raw sequential, a DataLoader on the same rows."""
    store = synthetic_store(folder, options.rows, options.d)
    batch, n_batches = 4096, options.rows // 4096

    def sequential() -> None:
        for index in range(store.n_windows("train")):
            x = store.window("train", index)["activations"]
            for start in range(0, len(x) - len(x) % batch, batch):
                x[start : start + batch].clone()

    def shuffled() -> None:
        for _ in itertools.islice(store.shuffled(batch, seed=0), n_batches):
            pass

    def prefetched() -> None:
        batches = Prefetched(store.shuffled(batch, seed=0), 4)
        for _ in range(n_batches):
            next(batches)
        batches.close()

    everything = torch.cat(
        [store.window("train", i)["activations"] for i in range(store.n_windows("train"))]
    )
    rows = torch.utils.data.TensorDataset(everything)

    def dataloader() -> None:
        generator = torch.Generator().manual_seed(0)
        loader = torch.utils.data.DataLoader(
            rows, batch_size=batch, shuffle=True, generator=generator, drop_last=True
        )
        for _ in loader:
            pass

    sides = {
        "raw sequential mmap": sequential, "shuffled": shuffled,
        "shuffled, prefetched": prefetched, "torch DataLoader (rows in RAM)": dataloader,
    }  # fmt: skip
    rows_read = n_batches * batch
    print(f"{options.rows:,} rows x {options.d} float32, warm, batches of {batch}")
    result = table(in_turn(sides, options.repeats), "rows", rows_read, "raw sequential mmap")
    ratio = result["shuffled"]["ratio"]
    faster = result["shuffled"]["median"] / result["torch DataLoader (rows in RAM)"]["median"]
    return {
        "sides": result,
        "ratio": ratio,
        "headline": f"shuffled reading: {ratio:.2f} of raw sequential, {faster:.1f}x a DataLoader",
        "better": float.__ge__,
    }


def synthetic_store(folder: Path, n_rows: int, d: int) -> ActivationStore:
    """A store of random rows, written as the writer writes."""
    info = SiteInfo("blocks.0.resid_post", "blocks.0", d, "vector", 1)
    selection = TokenSelection("all", drop_positions=(0,))
    window = 65_536
    ids = {"train": np.arange(n_rows), "heldout": np.arange(n_rows, n_rows + 1024)}
    plan = WindowPlan(ids, window, 0)  # type: ignore[arg-type]
    target = selection_dir(folder, info.name, selection)
    generator = torch.Generator().manual_seed(0)
    for split in SPLITS:
        for w in range(plan.n_windows(split)):
            own = torch.as_tensor(plan.examples(split, w))
            x = torch.randn(len(own), d, generator=generator)
            rows = WindowRows({info.name: x}, own.int(), torch.zeros_like(own).int(), None, [])
            _write_window({info.name: target}, split, w, rows)
    _finish(target, info, selection, plan, "fp32")
    files.write_json(folder / "store.json", {"sites": {info.name: site_to_json(info)}})
    return ActivationStore(target, mix_rows=2**20)


# -- cache -------------------------------------------------------------------------------------


def bench_cache(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Cache one site, beside a loop of the same forwards and loader that keeps nothing."""
    pipeline = composed(options, folder)
    model, dataset, info = pipeline.model, pipeline.dataset, pipeline.site
    plan, loading = pipeline.plan(info), pipeline.loading
    count = itertools.count()

    def forwards(split: Any) -> Iterator[None]:
        for window in range(plan.n_windows(split)):
            ids = plan.examples(split, window)
            for loaded in load_batches(dataset, model, ids, loading.batch_size, loading.workers):
                if loaded.inputs is not None:
                    with torch.no_grad():
                        model.record(loaded.inputs.to(model.device), [info.name])
                yield

    def bare() -> None:
        for split in ("train", "heldout"):
            for _ in forwards(split):
                pass

    def cache() -> None:
        write_selections(
            folder / f"store{next(count)}", model, dataset, [info], pipeline.selection, plan,
            dtype=pipeline.store_options.dtype, batch_size=loading.batch_size,
            workers=loading.workers, max_bad=loading.max_bad,
        )  # fmt: skip

    n = sum(map(len, plan.ids.values()))
    print(f"{options.model}, {info.name}, {n:,} examples, batches of {loading.batch_size}")
    result = table(
        in_turn({"bare loop": bare, "cache": cache}, options.repeats), "examples", n, "bare loop"
    )
    cost = 1 / result["cache"]["ratio"] - 1
    return {
        "sides": result,
        "ratio": cost,
        "headline": f"caching costs {100 * cost:+.1f}% over the bare loop of the same forwards",
        "better": float.__le__,
    }


def composed(options: argparse.Namespace, folder: Path) -> Pipeline:
    """The pipeline of `sae-run train model=… …`, writing below `folder`."""
    words = [f"model={options.model}", f"outputs={folder}", *options.overrides]
    if not any(word.startswith("dataset.n_examples") for word in words):
        words.append(f"dataset.n_examples={options.examples}")
    job = composed_jobs("train", words)[0]
    return Pipeline(job.cfg, job.choices)


# -- memory ------------------------------------------------------------------------------------


def bench_memory(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Peak memory of `sae-run cache` in processes of their own, for 1x and 10x the data."""
    peaks = {}
    for times in (1, 10):
        n = 40_000 * times
        code = (
            "import resource, sys; from sae_runner.cli import main\n"
            "main()\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
        )
        words = ["cache", "model=toy", f"dataset.n_examples={n}", f"outputs={folder}/{times}",
                 "store.window_rows=16384"]  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
        )
        peaks[f"{times}x"] = int(done.stdout.split()[-1])
        print(f"{n:>10,} examples: peak {peaks[f'{times}x']:,} MiB")
    ratio = peaks["10x"] / peaks["1x"]
    return {
        "sides": peaks,
        "ratio": ratio,
        "headline": f"ten times the data: {ratio:.3f}x the peak memory",
        "better": float.__le__,
    }


# -- startup -----------------------------------------------------------------------------------


def bench_startup(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds until help is shown, beside the import of torch."""

    def call(*words: str) -> Callable[[], None]:
        return lambda: void(subprocess.run(words, capture_output=True, check=True, cwd=folder))

    run = [sys.executable, "-m", "sae_runner"]
    sides = {
        "import torch": call(sys.executable, "-c", "import torch"),
        "sae-run --help": call(*run, "--help"),
        "sae-run train --help": call(*run, "train", "--help"),
        "sae-run train --cfg job": call(*run, "train", "--cfg", "job"),
    }
    times = in_turn(sides, options.repeats)
    for name, seconds in times.items():
        print(f"{name:28}{1000 * statistics.median(seconds):>8.0f} ms")
    median = statistics.median(times["sae-run train --help"])
    return {
        "sides": times,
        "ratio": median,
        "headline": f"`train --help` takes {median:.2f} s",
        "better": float.__le__,
    }


# -- together ----------------------------------------------------------------------------------


def bench_together(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train 8 SAEs of 4,096 latents over one store: together, and one after another."""
    n_rows = min(options.rows, 65_536)
    store = synthetic_store(folder / "store", n_rows, options.d)
    sae_options = preset("sae", "topk") | {"d_sae": 4096, "expansion": None}
    own = {"n_tokens": n_rows, "save_every": None, "keep_state": False}
    train_options: TrainOptions = construct(
        TrainOptions.from_config, preset("trainer", "default") | own, where="trainer"
    )

    def initialised(name: str) -> Iterator[Trainer]:
        for seed in range(8):
            run_dir = folder / name / str(seed)
            files.remove(run_dir)
            run_dir.mkdir(parents=True)
            trainer = Trainer(
                SAES.build(sae_options, d_in=options.d), store, train_options, run_dir, seed=seed,
                data_seed=0, device=torch.device("cpu"), facts={},
            )  # fmt: skip
            trainer.initialise()
            yield trainer

    def one_after_another() -> None:
        for trainer in initialised("alone"):
            trainer.run()

    sides = {
        "8 runs in a row": one_after_another,
        "together": lambda: run_together(list(initialised("together")), lambda _, e: void(e)),
    }
    rows = table(in_turn(sides, options.repeats), "rows", 8 * n_rows, "8 runs in a row")
    ratio = rows["together"]["ratio"]
    return {
        "sides": rows,
        "ratio": ratio,
        "better": float.__ge__,
        "headline": f"8 SAEs together: {ratio:.2f} times as fast as 8 runs in a row",
    }


def void(_: object) -> None:
    """Forget a result."""


if __name__ == "__main__":
    main()
