"""The passes that all evaluators share: one over stored rows, one over inputs with the model run.

Rows are read and encoded once. Each batch of inputs is run once as it is and once for each kind of
splice that anybody wants. An evaluator that fails is left out from there on; the others go on.
"""

import functools
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_runner.evaluators._codes import Codes
from sae_runner.evaluators._collecting import CodesCollector
from sae_runner.evaluators.base import (
    EvalContext,
    Evaluator,
    Findings,
    Rows,
    Setting,
    Spliced,
    SpliceKind,
)
from sae_runner.log import Progress, working
from sae_runner.meters import peak_rss_mib
from sae_runner.models.base import Inputs, Model
from sae_runner.saes.base import SAE
from sae_runner.splice import Run, run

KINDS: tuple[SpliceKind, ...] = ("clean", "recon", "zero", "mean")
Found = Callable[[str, Findings, dict[str, Any]], None]


class InputPass(NamedTuple):
    """What the pass over inputs needs."""

    model: Callable[[], Model]
    batches: Callable[[], Iterable[Inputs]]
    n_examples: int
    mean: Callable[[], Tensor]
    """[d]: of the training rows at the site that is spliced, for `mean`; a stream runs the model
    for it."""


class Cost:
    """What has been spent so far, for the `cost` blocks."""

    def __init__(self, names: Sequence[str]) -> None:
        self.started, self.names = time.perf_counter(), sorted(names)
        self.rows = self.sae_encodes = self.full_forwards = self.partial_forwards = 0

    def block(self, finish_s: float, own: Counter[str]) -> dict[str, Any]:
        """Of an evaluator whose `finish` took so long, and who ran model and SAE `own` times."""
        return {
            "wall_s": round(time.perf_counter() - self.started, 3),
            "finish_s": round(finish_s, 3),
            "rows": self.rows,
            "sae_encodes": self.sae_encodes + own["sae_encodes"],
            "full_forwards": self.full_forwards + own["full_forwards"],
            "partial_forwards": self.partial_forwards + own["partial_forwards"],
            "shared_with": self.names,
            "peak_rss_mib": peak_rss_mib(),
        }


class Going:
    """The evaluators that have not failed yet."""

    def __init__(self, evaluators: Mapping[str, Evaluator]) -> None:
        self.evaluators = dict(evaluators)
        self.failures: dict[str, Exception] = {}

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Inside, what an evaluator fails of ends it alone."""
        try:
            yield
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # Which may hold batches.
            self.failures[name] = error
            del self.evaluators[name]

    def each(self) -> list[tuple[str, Evaluator]]:
        """Those that are left."""
        return list(self.evaluators.items())


@torch.no_grad()
def measure(
    evaluators: Mapping[str, Evaluator],
    rows: Iterable[Any],
    context: EvalContext,
    on_found: Found,
    *,
    inputs: InputPass | None = None,
    keep_bytes: int = 2**31,
    folder: Path | None = None,
) -> dict[str, Exception]:
    """Run every evaluator over the fewest passes; hand on what each found as soon as it is known.

    Args:
        evaluators: by their names in the report.
        rows: batches with `x, example_id, position, label` on the CPU; read if anybody wants them.
        context: what an evaluator may ask for besides.
        on_found: told an evaluator's name, findings and cost.
        inputs: for evaluators that splice.
        keep_bytes: what the codes may take.
        folder: each evaluator may keep things in its own folder below.

    Returns:
        What failed, by evaluator.
    """
    going, cost = Going(evaluators), Cost(list(evaluators))
    codes, spent = _Lazy(), {name: Counter[str]() for name in evaluators}
    for name, evaluator in going.each():
        own = None if folder is None else folder / name
        with going.attempt(name):
            of_it = counted(context, spent[name])
            evaluator.start(replace(of_it, codes=codes, folder=own))
    if any(evaluator.reads_rows() for _, evaluator in going.each()):
        codes.collector = _rows_pass(going, rows, context, cost, keep_bytes)
    if any(evaluator.splices for _, evaluator in going.each()):
        assert inputs is not None and context.setting is not None
        _input_pass(going, inputs, context.sae, context.setting, cost)
    for name, evaluator in going.each():
        began = time.perf_counter()
        with going.attempt(name), working(f"eval: {name}"):
            found = evaluator.finish()
            found.left_out |= evaluator.keeps_codes and codes().n_left_out > 0
        if name not in going.failures:  # What goes wrong in keeping it is not the evaluator's.
            on_found(name, found, cost.block(time.perf_counter() - began, spent[name]))
    return going.failures


def counted(context: EvalContext, spent: Counter[str]) -> EvalContext:
    """A context of an evaluator's own: the SAE's rows that it asks for are in its cost."""
    rows, rows_of = context.rows, context.rows_of

    def seen(batches: Iterator[Rows]) -> Iterator[Rows]:
        for batch in batches:
            spent["sae_encodes"] += len(batch.x)
            yield batch

    return replace(
        context,
        spent=spent,
        rows=rows and (lambda split, n: seen(rows(split, n))),
        rows_of=rows_of and (lambda dataset, split: seen(rows_of(dataset, split))),
    )


class _Lazy:
    """The codes of a pass, put in order when somebody first asks."""

    def __init__(self) -> None:
        self.collector: CodesCollector | None = None
        self.codes: Codes | None = None

    def __call__(self) -> Codes:
        if self.codes is None:
            assert self.collector is not None
            self.codes = self.collector.finish()
        return self.codes


def encoded(sae: SAE, batch: Any) -> Rows:
    """A batch of stored rows on the SAE's device, with latents and reconstruction."""
    stored = batch.x.to(sae.b_dec.device)
    read, x = sae.input_of(stored), sae.target_of(stored)
    x_hat, latents = sae(read)
    of = batch.example_id, batch.position, batch.label
    return Rows(x, latents, x_hat, *of, None if read is x else read)


def _rows_pass(
    going: Going, rows: Iterable[Any], context: EvalContext, cost: Cost, keep_bytes: int
) -> CodesCollector | None:
    keeps = any(evaluator.keeps_codes for _, evaluator in going.each())
    collector = CodesCollector(keep_bytes, context.seed) if keeps else None
    with Progress("eval", context.n_rows, "rows") as progress:
        for batch in rows:
            shared = encoded(context.sae, batch)
            if collector is not None:
                collector.add(shared)
            for name, evaluator in going.each():
                with going.attempt(name):
                    evaluator.update(shared)
            cost.rows += len(shared.x)
            cost.sae_encodes += len(shared.x)
            progress.advance(len(shared.x))
    return collector


def _input_pass(going: Going, inputs: InputPass, sae: SAE, setting: Setting, cost: Cost) -> None:
    model = inputs.model()
    wanted = {kind for _, evaluator in going.each() for kind in evaluator.splices}
    watched = {i.name: i for _, e in going.each() if e.splices for i in e.watches(setting)}
    mean = functools.cache(inputs.mean)
    with Progress("eval: model", inputs.n_examples, "examples") as progress:
        for batch in inputs.batches():
            for spliced in splices(
                model, batch.to(model.device), sae, setting, mean,
                [kind for kind in KINDS if kind in wanted], list(watched.values()),
            ):  # fmt: skip
                for name, evaluator in going.each():
                    if spliced.kind in evaluator.splices:
                        with going.attempt(name):
                            evaluator.update_spliced(spliced)
                if spliced.kind != "clean":
                    cost.partial_forwards += len(batch)
                if spliced.kind == "recon":
                    cost.sae_encodes += int(spliced.replaced.sum())
            cost.full_forwards += len(batch)
            progress.advance(len(batch))


def splices(
    model: Model,
    inputs: Inputs,
    sae: SAE,
    setting: Setting,
    mean: Callable[[], Tensor],
    kinds: Sequence[SpliceKind],
    watched: Sequence[Any],
) -> Iterator[Spliced]:
    """Run a batch as it is, then once for each kind of splice.

    Where a site is predicted from another (a transcoder), that one is what is replaced.
    """
    site, place = setting.site, setting.spliced_site
    beside = [] if site == place else [site]
    clean = run(model, inputs, place, watched=[*beside, *watched])
    found = clean.sites[place.name]
    replaced = setting.selection.mask(site, inputs, found.shape[1])
    at = replaced.to(found.device)
    for kind in kinds:
        if kind == "clean":
            yield Spliced(kind, inputs, at, clean, clean)
            continue
        match kind:
            case "recon":
                x = clean.sites[site.name][at]
                instead = sae(x.to(torch.promote_types(x.dtype, torch.float32))).x_hat
            case "zero":
                instead = found.new_zeros(found.shape[-1])
            case "mean":
                instead = mean().to(found.device)
        x = found.clone()
        x[at] = instead.to(found.dtype)
        seen = watched if kind == "recon" else ()
        ran: Run = run(model, inputs, place, x, watched=seen)
        yield Spliced(kind, inputs, at, clean, ran)
