"""Probes: how much of a task is in one latent, in a few, in all, and in the raw activations.

Each example of the dataset is one vector: the latents of its tokens, pooled, and its raw
activations (of what is reconstructed), pooled alike. Probes are fitted on examples of the train
split and measured on held-out ones. Tasks are the dataset's classes, each against the rest, and
questions that a text answers itself (`_text_tasks`). With L = mean cross-entropy in nats:

    probe_loss_train_min  least L over single latents, on the train set (Gao et al. 2024)
    probe_loss_test       L of that same latent on the test set: nothing is chosen there
    base_entropy          H of the test set's labels: the loss of a probe that knows nothing
    excess                probe_loss_test / base_entropy; 1: useless, 0: perfect
    gap_to_full           probe_loss_test − llm_full_loss

and to compare with, on the same examples: `coordinate_loss` (the best raw coordinate alone),
`mean_difference_loss` (h along the difference of the class means), `random_direction_loss` (the
best of d_sae random directions of h), `llm_full_loss` and `sae_full_loss` (logistic regression on
all of h, on all latents). `sae_top_{k}_test_accuracy`: logistic regression on the k latents of the
largest difference of class means, in their own units (SAEBench; Gurnee et al. 2023);
`llm_top_{k}_test_accuracy`: likewise on raw coordinates.

With `latent: pre` the pre-activations of latents, pooled alike, stand for them in all of this (Gao
et al. 2024): a latent may tell a task apart before it fires. They are dense: [n, d_sae] in float32.

Category `probes` holds means over tasks, `probes_labels` and `probes_text` those over each kind.
Intervals are over tasks: that an average of so few tasks moves with the tasks is what they show.
"""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt

from sae_runner.config import NonNegative, Positive, PositiveFloat, Range
from sae_runner.data.base import Example
from sae_runner.errors import ConfigError
from sae_runner.evaluators import EVALUATORS
from sae_runner.evaluators._bootstrap import checked_resamples, intervals, ratio_of
from sae_runner.evaluators._numbers import Scalars
from sae_runner.evaluators._pooling import Pool, Pooled, PreActs, pooled
from sae_runner.evaluators._probe_task import Measured, Options, measure_task
from sae_runner.evaluators._tasks import Family, Task, class_tasks, text_tasks
from sae_runner.evaluators._text_tasks import answers, n_words
from sae_runner.evaluators.base import EvalContext, Evaluator, Findings, Rows, Setting
from sae_runner.log import Progress
from sae_runner.models._text import ReadsTokens

# Columns of a task's row that are no numbers to average.
NOT_AVERAGED = ("task", "family", "best_latent", "w", "b", "llm_full_C", "sae_full_C")
NO_INTERVAL = ("n_train", "n_test", "positive_rate_test", "n_constant")
WHAT = {"labels": "classes", "text": "text"}
FEW_TASKS = 10


@EVALUATORS.register("probes")
class Probes(Evaluator):
    """Logistic probes on pooled latents and on pooled raw activations.

    Args:
        tasks: `labels`, the dataset's classes; `text`, questions about the text; those that the
            dataset can serve are taken.
        latent: `post`, latents as they are decoded, or `pre`, before their activation function.
        pool: what an example's tokens become.
        n_train: examples of the train split.
        n_test: examples of the held-out split.
        balance: subsample the more frequent answer of each task.
        min_per_class: examples of either answer, in either split, below which a task is left out.
        max_classes: classes, the most frequent ones, that are tasks.
        ridge: on the squared standardised weight of single probes.
        k: sizes of sparse probes.
        strengths: values of scikit-learn's C that the full probes choose from.
        n_folds: folds in which they choose.
        n_bootstrap: resamples of the tasks for the intervals; 0 for none.
    """

    axis = "both"
    sizes = ()

    def __init__(
        self,
        *,
        tasks: list[Family],
        latent: Literal["post", "pre"],
        pool: Pool,
        n_train: Positive,
        n_test: Positive,
        balance: bool,
        min_per_class: Annotated[int, Range(ge=2)],
        max_classes: Positive,
        ridge: PositiveFloat,
        k: Annotated[list[int], Range(gt=0)],
        strengths: Annotated[list[float], Range(gt=0)],
        n_folds: Annotated[int, Range(ge=2)],
        n_bootstrap: NonNegative,
    ) -> None:
        for key, values in (("tasks", tasks), ("strengths", strengths)):
            if not values:
                raise ConfigError(f"evaluators.probes.{key} is empty: name at least one")
        self.families, self.latent, self.pool, self.balance = tasks, latent, pool, balance
        self.n_train, self.n_test = n_train, n_test
        self.min_per_class, self.max_classes = min_per_class, max_classes
        self.ridge, self.k, self.strengths, self.n_folds = ridge, sorted(set(k)), strengths, n_folds
        self.n_bootstrap = checked_resamples(n_bootstrap, "probes")

    def check(self, setting: Setting) -> None:
        """Refuse a dataset that no task can be made of, and a class token that is not there."""
        dataset = setting.dataset
        classes = dataset.label_names
        is_text = dataset.modality in ("text", "tokens")
        asks_text = is_text and "text" in self.families
        if not asks_text and not (classes and "labels" in self.families):
            use = "tasks=[labels]" if classes else "tasks=[text]"
            if not classes and not is_text:
                use = "a labelled dataset, or one of text"
            raise ConfigError(
                f"tasks={','.join(self.families)}: dataset {dataset.name!r} has no "
                f"{' and no '.join(WHAT[family] for family in self.families)}; use {use}"
            )
        if classes and len(classes) < 2 and not asks_text:
            raise ConfigError(
                f"dataset {dataset.name!r} has one class, {classes[0]!r}: nothing to tell apart"
            )
        if self.latent == "pre":
            self._check_pre_acts(setting)
        if self.pool == "cls":
            tokens = setting.selection.tokens
            is_image = setting.site.grid is not None
            if not setting.site.has_cls or not (tokens == "cls" or (tokens == "all" and is_image)):
                raise ConfigError(
                    f"pool=cls: site.tokens={tokens} of {setting.site.name} has no class token; "
                    "use pool=mean"
                )

    def _check_pre_acts(self, setting: Setting) -> None:
        assert setting.sae is not None
        sae = setting.sae()
        if sae.no_pre_acts:
            raise ConfigError(f"latent=pre: not of sae={sae.kind}: {sae.no_pre_acts}; use post")
        n = self.n_train + self.n_test
        # All examples and those of one task; then inner products of a task's, twice.
        n_bytes = 2 * 4 * n * sae.d_sae + 2 * 8 * self.n_train * min(self.n_train, sae.d_sae)
        if n_bytes > setting.keep_bytes:
            raise ConfigError(
                f"latent=pre: {n:,} examples of {sae.d_sae:,} numbers take {n_bytes / 1e9:.1f} GB, "
                f"more than eval.keep_gb={setting.keep_bytes / 1e9:g}; lower n_train and n_test, "
                "or raise that"
            )

    def start(self, context: EvalContext) -> None:
        """See `Evaluator.start`."""
        self.context = context

    def finish(self) -> Findings:
        """Means over tasks, table `tasks`, and array `losses`: each latent's loss on each task."""
        assert self.context.rows is not None
        train = self._pooled(self.context.rows("train", self.n_train), self.n_train)
        test = self._pooled(self.context.rows("heldout", self.n_test), self.n_test)
        main = Scalars("probes")
        wanted = self._tasks(train, test, main)
        options = Options(self.ridge, self.k, self.strengths, self.n_folds, self.context.seed)
        measured: list[Measured] = []
        with Progress("probes", len(wanted), "tasks") as progress:
            for task in wanted:
                measured.append(measure_task(task, train, test, options))
                progress.advance(1)
        return self._findings(main, measured)

    def _pooled(self, batches: Iterable[Rows], n: int) -> Pooled:
        """Examples, n of them at most."""
        pre = PreActs(self.context.sae, self.pool, n) if self.latent == "pre" else None
        return pooled(batches, self.pool, pre)

    # -- Tasks -----------------------------------------------------------------------------------

    def _tasks(self, train: Pooled, test: Pooled, main: Scalars) -> list[Task]:
        """The tasks that have enough examples; the others get a note."""
        assert self.context.dataset is not None
        dataset = self.context.dataset()
        balance, seed = self.balance, self.context.seed
        tasks: list[Task] = []
        if "labels" in self.families and train.label is not None and test.label is not None:
            found, n_left_out = class_tasks(
                train.label, test.label, dataset.label_names or (), most=self.max_classes,
                balance=balance, seed=seed,
            )  # fmt: skip
            tasks += found
            if n_left_out:
                detail = f"{n_left_out} classes beyond max_classes={self.max_classes} left out"
                main.note("n_tasks", "not_applicable", detail)
        if "text" in self.families and dataset.modality in ("text", "tokens"):
            of_train, of_test = self._answers(train, test)
            tasks += text_tasks(of_train, of_test, balance=balance, seed=seed)
        kept = []
        for task in tasks:
            if why := task.too_few(self.min_per_class):
                empty = not all((*task.train.counts, *task.test.counts))
                code = "single_class" if empty else "too_few_examples"
                detail = f"task {task.name} left out: {why}, at least {self.min_per_class} of each"
                main.note("n_tasks", code, detail)
            else:
                kept.append(task)
        main.put("n_tasks", len(kept))
        main.put("n_tasks_left_out", len(tasks) - len(kept))
        return kept

    def _answers(
        self, train: Pooled, test: Pooled
    ) -> tuple[dict[str, npt.NDArray[np.bool_]], dict[str, npt.NDArray[np.bool_]]]:
        texts = self._texts(np.union1d(train.ids, test.ids))
        of_train, of_test = ([texts[i] for i in part.ids.tolist()] for part in (train, test))
        median = float(np.median(n_words(of_train)))
        return answers(of_train, median), answers(of_test, median)

    def _texts(self, ids: npt.NDArray[np.int64]) -> dict[int, str]:
        """Texts by id; those of packed tokens are put together from their pieces."""
        assert self.context.dataset is not None and self.context.model is not None
        dataset = self.context.dataset()
        found = {e.id: e.value for e in dataset.load(ids) if isinstance(e, Example)}
        if dataset.modality == "tokens":
            model = self.context.model()
            assert isinstance(model, ReadsTokens)
            found = {i: "".join(model.pieces(tokens.tolist())) for i, tokens in found.items()}
        return found

    # -- Findings --------------------------------------------------------------------------------

    def _findings(self, main: Scalars, measured: Sequence[Measured]) -> Findings:
        rows = [m.row for m in measured]
        families = sorted({row["family"] for row in rows})
        groups = {main: rows}
        if len(families) > 1:
            groups |= {
                Scalars(f"probes_{f}"): [row for row in rows if row["family"] == f]
                for f in families
            }
        findings = Findings({})
        for scalars, of in groups.items():
            self._average(scalars, of, findings)
        for m in measured:
            self._note_task(main, m)
        findings.notes += [note for scalars in groups for note in scalars.notes]
        if rows:
            findings.tables["tasks"] = {name: [row[name] for row in rows] for name in rows[0]}
            names = [row["task"] for row in rows]
            losses = np.stack([m.losses for m in measured]).astype(np.float32)
            findings.arrays["losses"] = losses_by_task(names, losses)
        return findings

    def _average(
        self, scalars: Scalars, rows: Sequence[dict[str, Any]], findings: Findings
    ) -> None:
        """Mean of every number over tasks, with an interval over tasks."""
        findings.metrics[scalars.category] = scalars.values
        if not rows:
            for name in ("probe_loss_test", "probe_loss_train_min", "excess", "gap_to_full"):
                scalars.null(name, "too_few_examples", "no task is left; see the notes on n_tasks")
            return
        columns = {}
        for name in rows[0]:
            if name in NOT_AVERAGED:
                continue
            values = [row[name] for row in rows if row[name] is not None]
            if len(values) < len(rows):
                scalars.null(name, "too_few_examples", "no latent tells some task's classes apart")
                continue
            scalars.put(name, float(np.mean(values)))
            if name not in NO_INTERVAL:
                columns[name] = np.array(values, dtype=np.float64)
        if not self.n_bootstrap:
            return
        if len(rows) < 2:
            scalars.note("probe_loss_test", "too_few_examples", "no interval: one task")
            return
        if len(rows) < FEW_TASKS:
            detail = f"{len(rows)} tasks: means and intervals depend on which ones they are"
            scalars.note("probe_loss_test", "too_few_examples", detail)
        statistics = {f"{scalars.category}.{name}": ratio_of(name, "task") for name in columns}
        found, notes = intervals(
            {"task": np.ones(len(rows)), **columns}, statistics,
            n_resamples=self.n_bootstrap, seed=self.context.seed,
        )  # fmt: skip
        findings.ci |= found
        findings.notes += notes

    def _note_task(self, main: Scalars, measured: Measured) -> None:
        task = measured.row["task"]
        if measured.row["best_latent"] is None:
            detail = f"task {task}: every latent is constant; its loss is that of the base rate"
            main.note("probe_loss_test", "constant_feature", detail)
        if measured.few:
            k = ", ".join(map(str, measured.few))
            detail = f"task {task}: fewer than k latents differ between the classes, k = {k}"
            main.note(f"sae_top_{measured.few[0]}_test_accuracy", "too_few_examples", detail)
        for name in measured.not_converged:
            detail = f"task {task}: 1000 iterations did not reach the minimum"
            main.note(f"{name}_full_loss", "not_applicable", detail)


def losses_by_task(names: Sequence[str], losses: npt.NDArray[np.float32]) -> dict[str, Any]:
    """Train losses of every latent's probe, by the task's name."""
    import torch

    return {name: torch.from_numpy(row.copy()) for name, row in zip(names, losses, strict=True)}
