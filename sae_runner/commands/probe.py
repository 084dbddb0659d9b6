"""`plan.probe=true`: how long caching and training take, from a few batches of each.

Nothing is written, and nothing is trained that lasts.
"""

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_runner.commands import objectives
from sae_runner.commands.pipeline import Pipeline
from sae_runner.commands.rehearsal import adapted, load_model
from sae_runner.config import resolve_device
from sae_runner.data.base import Split
from sae_runner.errors import DataError
from sae_runner.log import duration
from sae_runner.models.base import Inputs, Model, SiteInfo
from sae_runner.statistics import ActivationStats
from sae_runner.store.activations import Position
from sae_runner.store.inputs import ShuffledInputs
from sae_runner.store.loading import load_batches
from sae_runner.store.reader import Activations
from sae_runner.store.window import select_rows, stored
from sae_runner.training.trainer import Trainer

if TYPE_CHECKING:
    from sae_runner.commands.plan import Plan

SECONDS = 5.0
"""What is timed ends after so long, or after so many batches, and has had one of each at least."""
N_BATCHES = 8
N_STEPS = 20


class Measured(NamedTuple):
    """What a few batches or steps took."""

    n: int
    unit: str
    seconds_each: float
    """Per example or per step."""

    def line(self, total: int, what: str) -> str:
        """`about 2m10s for 50,000 examples (8 batches measured, 384 examples/s)`."""
        took = duration(total * self.seconds_each)
        rate = 1 / max(self.seconds_each, 1e-9)
        per_s = f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
        return f"about {took} for {total:,} {what} ({self.unit} measured: {self.n}; {per_s}/s)"


class RowsInMemory(Activations):
    """Rows that were never stored, as one window."""

    def __init__(self, site: SiteInfo, x: Tensor) -> None:
        self.site, self.x = site, x

    def n_windows(self, split: Split) -> int:
        """One."""
        return 1

    def n_rows(self, split: Split) -> int:
        """All of them, in either split."""
        return len(self.x)

    def window(self, split: Split, index: int) -> dict[str, Tensor]:
        """All rows."""
        number = torch.arange(len(self.x))
        return {"activations": self.x, "example_id": number, "position": torch.zeros_like(number)}

    def stats(self, n_sample: int = 32768) -> ActivationStats:
        """Of all rows."""
        norms = torch.linalg.vector_norm(self.x, dim=1, dtype=torch.float64)
        mean, square = float(norms.mean()), float(norms.square().mean())
        return ActivationStats(self.x.double().mean(0).float(), mean, square, self.x[:n_sample])


class Cached(NamedTuple):
    """A few batches, read, prepared and recorded."""

    measured: Measured
    """Seconds per example."""
    rows: Tensor
    """Of the first site: [n, d] float32."""
    rows_per_example: float


def time_caching(copy: Pipeline, infos: Sequence[SiteInfo]) -> Cached | None:
    """Do a little of what caching does; None where the model has to be trained first.

    Raises:
        DataError: nothing can be read.
    """
    model = load_model(copy)
    if model is None:
        return None
    dataset, size = adapted(model, copy.raw_dataset).dataset, copy.loading.batch_size
    ids = dataset.ids("train")
    if dataset.random_access:
        ids = ids[np.random.default_rng(copy.store_options.seed).permutation(len(ids))]
    more = ids[size : size * (N_BATCHES + 1)] if len(ids) > size else ids
    rows, n_all = list[Tensor](), 0
    # The first batch pays for what later ones find done.
    for chosen in (ids[:size], more):
        n = n_examples = 0
        start = time.perf_counter()
        for inputs, _ in load_batches(dataset, model, chosen, size, copy.loading.workers):
            if inputs is not None:
                rows.append(record(copy, model, inputs.to(model.device), infos))
                n, n_examples, n_all = n + 1, n_examples + len(inputs), n_all + len(inputs)
            if time.perf_counter() - start > SECONDS:
                break
        seconds = time.perf_counter() - start
    if not rows:
        raise DataError(f"dataset={copy.choices['dataset']}: no example that was tried can be read")
    x = torch.cat(rows)
    measured = Measured(n, "batches", seconds / max(1, n_examples))
    return Cached(measured, x, len(x) / n_all)


@torch.no_grad()
def record(copy: Pipeline, model: Model, inputs: Inputs, infos: Sequence[SiteInfo]) -> Tensor:
    """Run one batch as caching would; rows [n, d] of the first site."""
    found = model.record(inputs, [info.name for info in infos])
    first: Tensor | None = None
    for info in infos:
        x, ids, _, _ = select_rows(found[info.name], info, copy.selection, inputs)
        kept = stored(x, copy.store_options.dtype, info, ids)
        first = kept.float() if first is None else first
    assert first is not None
    return first


def time_training(
    copy: Pipeline, store: Activations, folder: Path, inputs: ShuffledInputs | None = None
) -> Measured:
    """Seconds per step of the composed SAE on rows, or inputs, that are at hand."""
    options, device = copy.train_options, torch.device(resolve_device(copy.cfg["device"]))
    sae = copy.build_sae(store.d_in)
    trainer = Trainer(
        sae, store, options, folder, seed=int(copy.cfg["seed"]),
        data_seed=copy.store_options.seed, device=device, facts={},
        dead_latents=copy.dead_latents,
        objective=objectives.build(copy, sae, None if inputs is None else inputs.model),
        source=inputs,
    )  # fmt: skip
    trainer.initialise()
    batches = trainer.source.shuffled(
        options.batch_size, copy.store_options.seed, start=Position(), device=device
    )
    n, start = 0, time.perf_counter()
    for i, batch in enumerate(itertools.islice(batches, N_STEPS + 1)):
        taken, _, _ = trainer.take_step(batch.x.to(device))
        float(taken.total)  # Waits for the device.
        if i == 0:
            start = time.perf_counter()
            continue
        n = i
        if time.perf_counter() - start > SECONDS:
            break
    return Measured(n, "steps", (time.perf_counter() - start) / n)


def inputs_of(plan: "Plan", copy: Pipeline) -> ShuffledInputs | None:
    """Inputs to take steps on; None where the model has to be trained first."""
    model = load_model(copy)
    if model is None:
        return None
    dataset = adapted(model, copy.raw_dataset).dataset
    per_example = plan.rows[plan.infos[0].name].n["train"] / max(1, plan.examples.n["train"])
    return ShuffledInputs(
        model, dataset, copy.site, copy.selection, workers=copy.loading.workers,
        n_rows=round(per_example * len(dataset.ids("train"))),
    )  # fmt: skip


def random_rows(site: SiteInfo, n: int, seed: int) -> RowsInMemory:
    """Rows of noise, where the model has none to give yet."""
    generator = torch.Generator().manual_seed(seed)
    return RowsInMemory(site, torch.randn(n, site.d, generator=generator))


def times(plan: "Plan", copy: Pipeline) -> list[tuple[str, str]]:
    """The lines of a plan that say how long."""
    lines, device = list[tuple[str, str]](), plan.device
    n_examples, rows = sum(plan.examples.n.values()), None
    if plan.missing:
        found = time_caching(copy, plan.missing)
        if found is None:
            lines.append(("time", "caching unknown: the model has to be trained here first"))
        else:
            rows, text = found.rows, found.measured.line(n_examples, "examples")
            lines.append(("time", f"caching {text} on {device}"))
            if plan.rows[plan.missing[0].name].sense:
                n = float(f"{found.rows_per_example * plan.examples.n['train']:.2g}")
                per = f"{found.rows_per_example:.3g} rows an example"
                lines.append(("", f"{per} in these batches: about {n:,.0f} train rows"))
    if plan.sae is None:
        return lines
    options, site, noise = plan.pipeline.train_options, plan.infos[0], ""
    if plan.on_disk and not plan.missing:
        store: Activations = plan.pipeline.open_store()
    elif rows is not None:
        store = RowsInMemory(site, rows)
    else:
        store, noise = (
            random_rows(site, 2 * options.batch_size, copy.store_options.seed),
            ", on noise",
        )
    inputs = None
    if objectives.runs_the_model(copy) and (inputs := inputs_of(plan, copy)) is None:
        return [*lines, ("time", "training unknown: the model has to be trained here first")]
    measured = time_training(copy, store, copy.outputs / "probe", inputs)
    text = measured.line(options.n_steps, "steps")
    lines.append(("time", f"training {text} on {device}{noise}"))
    if not plan.on_disk:
        lines.append(("", "and in every epoch as long as caching: the rows are not kept"))
    lines.append(("", "writing, waiting for the disk, AuxK and evaluation are not in these"))
    return lines
