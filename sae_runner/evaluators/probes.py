"""Probes: how much of a task is in one latent, in a few, in all, and in the raw activations.

Each example of the dataset is one vector: the latents of its tokens, pooled, and its raw
activations (of what is reconstructed), pooled alike. Probes are fitted on examples of the train
split and measured on held-out ones. Tasks are the dataset's classes, each against the rest,
questions that a text answers itself (`_text_tasks`), and labelled files of any other examples
(`_task_files`), which the model reads as it does the dataset's. With L = mean cross-entropy in
nats:

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

Category `probes` holds means over tasks; `probes_labels`, `probes_text` and `probes_FILE` those
over each family, where there are several (`_probe_findings`).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt

from sae_runner.config import NonNegative, Positive, PositiveFloat, Range
from sae_runner.data._labelled_files import LabelledFile
from sae_runner.data.base import SPLITS, Dataset, Example, Split
from sae_runner.errors import ConfigError, DataError
from sae_runner.evaluators import EVALUATORS
from sae_runner.evaluators._bootstrap import checked_resamples
from sae_runner.evaluators._numbers import Scalars
from sae_runner.evaluators._pooling import Pool, Pooled, PooledPreActs, pooled
from sae_runner.evaluators._probe_findings import findings_of
from sae_runner.evaluators._probe_task import Measured, Options, measure_task
from sae_runner.evaluators._task_files import check_files, family_of, names_of_tasks, opened
from sae_runner.evaluators._tasks import Family, Task, class_tasks, text_tasks
from sae_runner.evaluators._text_tasks import answers, n_words
from sae_runner.evaluators.base import EvalContext, Evaluator, Findings, Rows, Setting
from sae_runner.log import Progress
from sae_runner.models._text import ReadsTokens

WHAT = {"labels": "classes", "text": "text"}


@EVALUATORS.register("probes")
class Probes(Evaluator):
    """Logistic probes on pooled latents and on pooled raw activations.

    Args:
        tasks: `labels`, the dataset's classes; `text`, questions about the text; those that the
            dataset can serve are taken.
        files: paths and globs of files of tasks.
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
    version = "2"  # 1 took a token that begins a row or a document for the first word of a text.
    sizes = ()

    def __init__(
        self,
        *,
        tasks: list[Family],
        files: list[str] | str,
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
        self.files = [files] if isinstance(files, str) else files
        if not tasks and not self.files:
            raise ConfigError("evaluators.probes.tasks is empty: name at least one, or files")
        if not strengths:
            raise ConfigError("evaluators.probes.strengths is empty: name at least one")
        self.families, self.latent, self.pool, self.balance = tasks, latent, pool, balance
        self.n_train, self.n_test = n_train, n_test
        self.min_per_class, self.max_classes = min_per_class, max_classes
        self.ridge, self.k, self.strengths, self.n_folds = ridge, sorted(set(k)), strengths, n_folds
        self.n_bootstrap = checked_resamples(n_bootstrap, "probes")

    def check(self, setting: Setting) -> None:
        """Refuse what no task can be made of, and latents or a class token that are not there."""
        if self.files:
            check_files(self._opened(0), setting.shapes().modality, self.min_per_class)
        else:
            self._check_dataset(setting.dataset)
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

    def _check_dataset(self, dataset: Dataset) -> None:
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

    def _opened(self, seed: int) -> list[LabelledFile]:
        """The files of tasks."""
        return opened(self.files, seed=seed, n_train=self.n_train, n_test=self.n_test)

    def reads(self) -> dict[str, str]:
        """Hashes of the files of tasks, images that they name included."""
        return {file.path.name: file.fingerprint() for file in self._opened(0)}

    def start(self, context: EvalContext) -> None:
        """See `Evaluator.start`."""
        self.context = context

    def finish(self) -> Findings:
        """Means over tasks, table `tasks`, and array `losses`: each latent's loss on each task."""
        main, n_found, measured = Scalars("probes"), 0, list[Measured]()
        options = Options(self.ridge, self.k, self.strengths, self.n_folds, self.context.seed)
        for what, train, test, found in self._groups(main):
            n_found += len(found)
            wanted = self._large_enough(found, main)
            with Progress(f"probes{what}", len(wanted), "tasks") as progress:
                for task in wanted:
                    measured.append(measure_task(task, train, test, options))
                    progress.advance(1)
        main.put("n_tasks", len(measured))
        main.put("n_tasks_left_out", n_found - len(measured))
        return findings_of(main, measured, self.n_bootstrap, self.context.seed)

    def _groups(self, main: Scalars) -> Iterator[tuple[str, Pooled, Pooled, list[Task]]]:
        """What tasks are of, for a line; their examples; and the tasks: data by data."""
        assert self.context.rows is not None and self.context.dataset is not None
        dataset = self.context.dataset()
        is_text = dataset.modality in ("text", "tokens")
        if ("labels" in self.families and dataset.label_names) or (
            "text" in self.families and is_text
        ):
            train = self._pooled(self.context.rows("train", self.n_train), self.n_train)
            test = self._pooled(self.context.rows("heldout", self.n_test), self.n_test)
            yield "", train, test, self._tasks(dataset, train, test, main)
        for file in self._opened(self.context.seed):
            train, test = (self._pooled_file(file, split) for split in SPLITS)
            assert train.label is not None and test.label is not None
            found, n_left_out = class_tasks(
                train.label, test.label, names_of_tasks(file), most=self.max_classes,
                family=family_of(file), balance=self.balance, seed=self.context.seed,
            )  # fmt: skip
            self._note_classes(main, n_left_out, f" of {file.path.name}")
            yield f" of {file.name}", train, test, found

    def _pooled_file(self, file: LabelledFile, split: Split) -> Pooled:
        assert self.context.rows_of is not None
        n = len(file.ids(split))
        self.context.spent["full_forwards"] += n
        try:
            return self._pooled(self.context.rows_of(file, split), n)
        except DataError as error:
            raise DataError(f"{file.where}: {error}") from None

    def _pooled(self, batches: Iterable[Rows], n: int) -> Pooled:
        """Examples, n of them at most."""
        pre = PooledPreActs(self.context.sae, self.pool, n) if self.latent == "pre" else None
        return pooled(batches, self.pool, pre)

    # -- Tasks -----------------------------------------------------------------------------------

    def _tasks(self, dataset: Dataset, train: Pooled, test: Pooled, main: Scalars) -> list[Task]:
        """Those of the dataset's own classes and texts."""
        balance, seed = self.balance, self.context.seed
        tasks: list[Task] = []
        if "labels" in self.families and train.label is not None and test.label is not None:
            found, n_left_out = class_tasks(
                train.label, test.label, dataset.label_names or (), most=self.max_classes,
                balance=balance, seed=seed,
            )  # fmt: skip
            tasks += found
            self._note_classes(main, n_left_out, "")
        if "text" in self.families and dataset.modality in ("text", "tokens"):
            of_train, of_test = self._answers(train, test)
            tasks += text_tasks(of_train, of_test, balance=balance, seed=seed)
        return tasks

    def _note_classes(self, main: Scalars, n_left_out: int, of: str) -> None:
        if n_left_out:
            detail = f"{n_left_out} classes{of} beyond max_classes={self.max_classes} left out"
            main.note("n_tasks", "not_applicable", detail)

    def _large_enough(self, tasks: Sequence[Task], main: Scalars) -> list[Task]:
        """The tasks that have enough examples; the others get a note."""
        kept = []
        for task in tasks:
            if why := task.too_few(self.min_per_class):
                empty = not all((*task.train.counts, *task.test.counts))
                code = "single_class" if empty else "too_few_examples"
                detail = f"task {task.name} left out: {why}, at least {self.min_per_class} of each"
                main.note("n_tasks", code, detail)
            else:
                kept.append(task)
        return kept

    def _answers(
        self, train: Pooled, test: Pooled
    ) -> tuple[dict[str, npt.NDArray[np.bool_]], dict[str, npt.NDArray[np.bool_]]]:
        texts = self._texts(np.union1d(train.ids, test.ids))
        of_train, of_test = ([texts[i] for i in part.ids.tolist()] for part in (train, test))
        median = float(np.median(n_words(of_train)))
        return answers(of_train, median), answers(of_test, median)

    def _texts(self, ids: npt.NDArray[np.int64]) -> dict[int, str]:
        """Texts by id; those of packed tokens are put together from their pieces.

        A space stands for each token that is no text: where a row or a document begins.
        """
        assert self.context.dataset is not None and self.context.model is not None
        dataset = self.context.dataset()
        found = {e.id: e.value for e in dataset.load(ids) if isinstance(e, Example)}
        if dataset.modality == "tokens":
            model = self.context.model()
            assert isinstance(model, ReadsTokens)
            special = model.token_rows([tokens.tolist() for tokens in found.values()]).special
            for row, (i, tokens) in enumerate(found.items()):
                pieces = model.pieces(tokens.tolist())
                if special is not None:
                    bare = special[row, : len(pieces)].tolist()
                    pieces = [" " if s else p for s, p in zip(bare, pieces, strict=True)]
                found[i] = "".join(pieces)
        return found
