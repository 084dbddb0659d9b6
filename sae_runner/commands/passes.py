"""What evaluators are given of a pipeline: the context, and the inputs that the model is run on."""

from collections.abc import Iterator

from sae_runner.commands.pipeline import Pipeline
from sae_runner.data.base import Dataset, Ids, Split
from sae_runner.evaluators._shared_pass import InputPass, encoded
from sae_runner.evaluators.base import EvalContext, Rows
from sae_runner.models.base import Inputs
from sae_runner.saes.base import SAE
from sae_runner.store.activations import Activations
from sae_runner.store.loading import load_batches


def context_of(sae: SAE, store: Activations, pipeline: Pipeline) -> EvalContext:
    """What evaluators may ask for besides the rows."""
    n_rows, wanted = store.n_rows("heldout"), pipeline.eval_options.n_rows
    mean = store.heldout_mean()

    def rows(split: Split, n_examples: int) -> Iterator[Rows]:
        size = pipeline.eval_options.batch_size
        return (encoded(sae, batch) for batch in store.rows(split, size, n_examples=n_examples))

    def rows_of(dataset: Dataset, split: Split) -> Iterator[Rows]:
        size = pipeline.eval_options.batch_size
        limit = getattr(store, "norm_limit", None)
        stream = pipeline.stream_of(dataset, norm_limit=limit, max_bad=dataset.max_bad)
        return (encoded(sae, batch) for batch in stream.rows(split, size))

    return EvalContext(
        sae=sae,
        n_rows=min(wanted or n_rows, n_rows),
        example_ids=store.example_ids("heldout"),
        seed=pipeline.eval_options.seed,
        mean=mean,
        # The parts of an image; a text's class token makes no picture of it.
        n_prefix=store.site.n_prefix if store.site.grid else 0,
        has_cls=store.site.has_cls and store.site.grid is not None,
        dataset=lambda: pipeline.dataset,
        model=lambda: pipeline.model,
        setting=pipeline.setting,
        n_latents=pipeline.eval_options.n_latents,
        rows=rows,
        rows_of=rows_of,
    )


def input_pass(store: Activations, pipeline: Pipeline, n_heldout: int) -> InputPass:
    """The inputs that the model is run on with the SAE in it: the first that the store visits."""
    n, loading = pipeline.eval_options.n_examples, pipeline.loading

    def ids() -> Ids:
        return pipeline.plan(pipeline.site).ids["heldout"][:n]

    def batches() -> Iterator[Inputs]:
        for loaded in load_batches(
            pipeline.dataset, pipeline.model, ids(), loading.batch_size, loading.workers
        ):
            if loaded.inputs is not None:  # What cannot be read was named when it was stored.
                yield loaded.inputs

    return InputPass(
        lambda: pipeline.model, batches, min(n, n_heldout),
        lambda: store.stats(1).mean[-store.d_out :],
    )  # fmt: skip
