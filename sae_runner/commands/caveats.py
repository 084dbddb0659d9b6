"""What a user would want to know before a run starts, one line each; for `plan` and `train`."""

from sae_runner import files
from sae_runner.commands import objectives
from sae_runner.commands.pipeline import Pipeline
from sae_runner.data.base import Dataset
from sae_runner.errors import DataError

NEVER = {
    "auxk": "AuxK will never fire",
    "ghost_grads": "ghost gradients will never flow",
    "resample": "no latent will be resampled",
}
"""What cannot happen in a run that is too short for a latent to be dead."""


def warnings_about(
    pipeline: Pipeline, n_rows: int, *, at_most: bool = False, n_dropped: int = 0
) -> list[str]:
    """What is odd about training on `n_rows` rows.

    Args:
        pipeline: what is composed.
        n_rows: training rows that there are, or will be.
        at_most: whether there may be fewer of them.
        n_dropped: training rows left out as norm outliers, where that is known.

    Raises:
        DataError: these are all rows.
    """
    if n_dropped and not n_rows:
        multiple = pipeline.store_options.max_norm_multiple
        raise DataError(
            f"store.max_norm_multiple={multiple}: drops all {n_dropped:,} training rows"
        )
    options, found = pipeline.train_options, []
    if options.n_tokens > n_rows:
        least, most = ("at least ", "at most ") if at_most else ("", "")
        found.append(
            f"store has fewer rows than trainer.n_tokens: {least}{options.n_tokens / n_rows:.1f} "
            f"epochs of {most}{n_rows:,} rows, reshuffled"
        )
    strategy = pipeline.dead_latents["type"]
    seen = (options.n_steps - 1) * options.batch_size
    if strategy in NEVER and options.dead_window > seen:
        n_tokens, when = options.n_tokens, ""
        if options.dead_window <= n_tokens:
            n_tokens, when = seen, " before the last step"
        found.append(
            f"dead horizon {options.dead_window:,} tokens > {n_tokens:,} training tokens{when}: "
            f"{NEVER[strategy]} (trainer.dead_window)"
        )
    found += limit_warnings(pipeline.raw_dataset)
    if n_dropped:
        found.append(f"{n_dropped:,} training rows dropped as norm outliers")
    if objectives.runs_the_model(pipeline):
        found += end_to_end_warnings(pipeline)
    if pipeline.cfg["model"].get("weights") == "random":
        found.append("model.weights=random: numbers will say nothing about a trained model")
    return found


def limit_warnings(dataset: Dataset) -> list[str]:
    """Limits that limit nothing: named, because they make another store of the same examples."""
    found = []
    for split, limit in dataset.limits.items():
        n, key = len(dataset.ids(split)), "n_examples" if split == "train" else "n_heldout"
        if limit is not None and n < limit:
            found.append(f"dataset.{key}={limit}: there are {n:,}, the same as null")
    return found


def end_to_end_warnings(pipeline: Pipeline) -> list[str]:
    """What to know of a training with the model in every step."""
    found = [
        "trainer/objective=e2e: the model is run twice in every step, once with a gradient; stored "
        "rows serve statistics and evaluation alone"
    ]
    sae = pipeline.build_sae(pipeline.site.d, device="meta")
    if sae.penalised and sae.target_l0 is None:
        found.append(
            f"sae={pipeline.choices['sae']}: its penalty's coefficient was chosen beside an error "
            "of the site, not beside a KL; sae.target_l0 finds one that gives the L0"
        )
    return found


def space_warnings(
    pipeline: Pipeline, store_bytes: int, run_bytes: int, *, at_most: bool = False
) -> list[str]:
    """What will not fit on the disk that `outputs` is on; `at_most` the store takes that much."""
    most = "at most " if at_most else ""
    if lack := files.lack_of_space(pipeline.outputs, store_bytes):
        return [f"store needs {most}{lack}"]
    if lack := files.lack_of_space(pipeline.outputs, store_bytes + run_bytes):
        return [f"store and checkpoints need {most}{lack}"]
    return []
