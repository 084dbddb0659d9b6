"""`sae-run plan`: what `train` would do with the same words and what it costs; writes nothing."""

from collections.abc import Iterator
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

from sae_runner import files
from sae_runner.commands import memory, objectives, train
from sae_runner.commands.cache import check_unchanged, is_cached
from sae_runner.commands.caveats import space_warnings, warnings_about
from sae_runner.commands.entries import read_run
from sae_runner.commands.job import Job
from sae_runner.commands.limits import checkpoint_bytes
from sae_runner.commands.ls import shown_path
from sae_runner.commands.pipeline import Pipeline
from sae_runner.commands.rehearsal import (
    count_examples,
    count_rows,
    load_model,
    rehearsal,
    trains_here,
    window_plan,
)
from sae_runner.commands.sites import layout, shape
from sae_runner.config import construct, resolve_device
from sae_runner.data.base import SPLITS
from sae_runner.log import working
from sae_runner.models.base import SiteInfo
from sae_runner.saes.base import SAE
from sae_runner.store.manifest import is_complete
from sae_runner.store.writer import estimate_bytes
from sae_runner.training import schedules

Line = tuple[str, str]


class PlanOptions(NamedTuple):
    """The `plan` block."""

    probe: bool

    @classmethod
    def from_config(cls, *, probe: bool) -> "PlanOptions":
        """Typed."""
        return cls(probe)


def check(job: Job) -> None:
    """Refuse what `train` would refuse anywhere; several sites are fine here."""
    pipeline = Pipeline(job.cfg, job.choices)
    pipeline.check(train=False)
    if len(pipeline.inputs) == 1:
        return train.check_composition(job)
    assert pipeline.train_options and pipeline.eval_options is not None
    assert pipeline.evaluators is not None


def main(job: Job) -> None:
    """Print the plan of one composed command.

    Raises:
        InputError: the command could not be run as it is.
    """
    lines, warnings = found(job)
    for head, text in lines:
        print(f"{head:<10}{text}")
    for warning in warnings:
        print(f"! {warning}")


@working("plan")
def found(job: Job) -> tuple[list[Line], list[str]]:
    """What there is to say, and to warn of."""
    options: PlanOptions = construct(PlanOptions.from_config, job.cfg["plan"], where="plan")
    check(job)
    pipeline = Pipeline(job.cfg, job.choices)
    if pipeline.store_options.kind == "disk" and is_cached(pipeline):
        check_unchanged(pipeline)
    with rehearsal(pipeline) as copy:
        plan = Plan(pipeline, copy)
        lines = list(plan.lines())
        if options.probe:
            from sae_runner.commands.probe import times

            lines += times(plan, copy)
        else:
            lines.append(("time", "not measured; plan.probe=true times a few batches and steps"))
        return lines, plan.warnings()


class Plan:
    """The numbers of a plan, and the lines that say them."""

    def __init__(self, pipeline: Pipeline, copy: Pipeline) -> None:
        self.pipeline, self.copy, self.infos = pipeline, copy, pipeline.infos
        self.on_disk = pipeline.store_options.kind == "disk"
        self.examples = count_examples(pipeline, copy)
        self.rows = {info.name: count_rows(pipeline, info, self.examples) for info in self.infos}
        self.device = resolve_device(pipeline.cfg["device"])

    # -- Numbers ---------------------------------------------------------------------------------

    @cached_property
    def sae(self) -> SAE | None:
        """The SAE without memory; None where there are several sites."""
        if len(self.pipeline.inputs) != 1:
            return None
        return self.pipeline.build_sae(self.infos[0].d, device="meta")

    @cached_property
    def missing(self) -> list[SiteInfo]:
        """Sites whose rows are not stored yet."""
        done = self.pipeline.selection_dir
        return [info for info in self.infos if not (self.on_disk and is_complete(done(info)))]

    def store_bytes(self, info: SiteInfo) -> int:
        """What the rows of a site take, or will take, on disk."""
        folder = self.pipeline.selection_dir(info)
        if info not in self.missing:
            return files.folder_bytes(folder)
        windows = window_plan(self.pipeline, info, self.examples)
        per_example = self.pipeline.rows_per_example(info)
        return estimate_bytes(windows, per_example, info.d, self.pipeline.store_options.dtype)

    def bytes_to_write(self) -> int:
        """What is not on disk yet of the store."""
        there = [files.folder_bytes(self.pipeline.selection_dir(info)) for info in self.missing]
        return max(0, sum(map(self.store_bytes, self.missing)) - sum(there)) if self.on_disk else 0

    def checkpoint_bytes(self) -> int:
        """What the checkpoints of the run take: weights, the state of each that keeps one."""
        return 0 if self.sae is None else checkpoint_bytes(self.pipeline.train_options, self.sae)

    def memory_of_caching(self) -> list[memory.Part]:
        """The largest of the passes that caching takes."""
        per_example = self.pipeline.rows_per_example
        groups = groupby(sorted(self.missing, key=per_example), key=per_example)
        passes = []
        for _, group in groups:
            infos = list(group)
            n_rows = self.rows[infos[0].name].n["train"]
            passes.append(memory.caching(self.pipeline, infos, n_rows))
        return max(passes, key=lambda parts: sum(part.n_bytes for part in parts), default=[])

    def memory_of_training(self) -> list[memory.Part]:
        """Of the one SAE."""
        if self.sae is None:
            return []
        n_rows = self.rows[self.infos[0].name].n["train"]
        parts = memory.training(self.pipeline, self.sae, n_rows)
        if not self.on_disk or objectives.runs_the_model(self.pipeline):
            return parts
        return parts + self.memory_of_caching()[:1]  # A process that has cached keeps the model.

    # -- Lines -----------------------------------------------------------------------------------

    def lines(self) -> Iterator[Line]:
        """Everything that is known without running anything."""
        pipeline = self.pipeline
        yield "model", self.model_text()
        yield "dataset", f"{pipeline.choices['dataset']}: {self.examples} examples"
        for info in self.infos[:8]:
            where = f"{info.name}: {shape(info, pipeline.context)}, {layout(info)}"
            yield (
                "site",
                f"{where}; {pipeline.selection.tokens} tokens, {self.rows[info.name]} rows",
            )
        if len(self.infos) > 8:
            yield "", f"and {len(self.infos) - 8} more sites"
        yield from self.store_lines()
        yield from self.training_lines()
        if self.on_disk and self.missing:
            yield "memory", f"caching {memory.summary(self.memory_of_caching(), self.device)}"
        if self.sae is not None:
            yield "memory", f"training {memory.summary(self.memory_of_training(), self.device)}"

    def model_text(self) -> str:
        """Its name, size and where its weights come from."""
        pipeline = self.pipeline
        n = sum(p.numel() for p in pipeline.shapes.parameters())
        text = f"{pipeline.choices['model']}: {n:,} parameters" if n else pipeline.choices["model"]
        if trains_here(pipeline):
            known = not self.missing or load_model(self.copy) is not None
            return text + (", trained here already" if known else ", to be trained here first")
        weights = pipeline.cfg["model"].get("weights")
        return text + (f", weights {weights}" if weights else "")

    def store_lines(self) -> Iterator[Line]:
        """Where the rows are, how much that is, and what of it is there."""
        pipeline, options = self.pipeline, self.pipeline.store_options
        if not self.on_disk:
            yield "store", "none (store=stream): the model runs again every epoch"
            return
        yield "store", shown_path(pipeline.store_dir)
        for info in self.infos[:8]:
            folder, windows = (
                pipeline.selection_dir(info),
                window_plan(pipeline, info, self.examples),
            )
            n = sum(windows.n_windows(split) for split in SPLITS)
            state = f"to be written, {n} windows"
            if info not in self.missing:
                state = "there, caching is skipped"
            elif there := len(list(folder.glob("*-*.safetensors"))):
                state = f"to be finished, {there} of {n} windows are there"
            most = "at most " if info in self.missing and self.rows[info.name].sense else ""
            size = files.size(self.store_bytes(info))
            yield "", f"{folder.name}: {most}{size} of {options.dtype}, {state}"

    def training_lines(self) -> Iterator[Line]:
        """The SAE, its training and its folder."""
        pipeline, options, sae = self.pipeline, self.pipeline.train_options, self.sae
        if sae is None:
            n, first = len(self.infos), self.infos[0].name
            yield "sae", f"none: {n} sites, and an SAE takes one: -m site.name={first},…"
            return
        n_rows, n = self.rows[self.infos[0].name], sum(p.numel() for p in sae.parameters())
        lr = schedules.learning_rate(options.lr, sae.d_sae)
        least = "at least " if "at most" in n_rows.sense else ""
        kept = len(options.checkpoint_steps()) + 1
        yield "sae", f"{pipeline.choices['sae']}: {sae.d_in} → {sae.d_sae:,}, {n:,} parameters"
        steps = f"{options.n_tokens:,} rows in {options.n_steps:,} steps of {options.batch_size:,}"
        epochs = f"{least}{options.n_tokens / max(1, n_rows.n['train']):.2f} epochs"
        yield "training", f"{steps}, {epochs}, lr {lr:.2g}{self.objective_text()}"
        yield "", f"{kept} checkpoint{'s' * (kept > 1)}, {files.size(self.checkpoint_bytes())}"
        seen = min(pipeline.eval_options.n_rows or n_rows.n["heldout"], n_rows.n["heldout"])
        names = ", ".join(pipeline.evaluators) or "no evaluators"
        yield "eval", f"{names} on {f'{n_rows.sense} {seen:,}'.strip()} held-out rows"
        if kinds := {kind for e in pipeline.evaluators.values() for kind in e.splices}:
            times = "once" if kinds == {"clean"} else f"{len(kinds | {'clean'})} times"
            n_inputs = min(pipeline.eval_options.n_examples, self.examples.n["heldout"])
            yield "", f"the model runs {times} on {n_inputs:,} held-out examples"
        yield "run", f"{shown_path(pipeline.run_dir)}: {self.run_text()}"

    def objective_text(self) -> str:
        """What is minimised, where that is not the SAE's own loss."""
        if not objectives.runs_the_model(self.pipeline):
            return ""
        return f", end to end ({self.pipeline.choices.get('trainer/objective')}), with the model"

    def run_text(self) -> str:
        """What is in the run's folder, and what `train` would make of it."""
        folder = self.pipeline.run_dir
        if not folder.exists():
            return "to be made"
        state = read_run(folder, "train", self.pipeline.outputs).state
        if self.pipeline.cfg["force"]:
            return f"{state}; force=true begins again"
        return "complete, training is skipped" if state == "complete" else f"{state}; it goes on"

    def warnings(self) -> list[str]:
        """What is odd, or will not fit."""
        unsure = any(self.rows[info.name].sense for info in self.missing)
        found = space_warnings(
            self.pipeline, self.bytes_to_write(), self.checkpoint_bytes(), at_most=unsure
        )
        if self.on_disk and self.missing:
            found += memory.shortage("caching", self.memory_of_caching(), self.device)
        if self.sae is not None:
            rows = self.rows[self.infos[0].name]
            at_most = "at most" in rows.sense
            found += memory.shortage("training", self.memory_of_training(), self.device)
            found += warnings_about(self.pipeline, rows.n["train"], at_most=at_most)
        return found
