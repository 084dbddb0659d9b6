"""What a run minimises, from its config: the objective, and the inputs that one may need."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sae_runner.errors import ConfigError, did_you_mean
from sae_runner.models.base import Model
from sae_runner.saes.base import SAE
from sae_runner.store.inputs import ShuffledInputs
from sae_runner.store.manifest import STORE_SCHEMA, check_same_source, read_json
from sae_runner.store.reader import Activations
from sae_runner.training.objectives import OBJECTIVES
from sae_runner.training.objectives.base import Objective, Source
from sae_runner.training.options import TrainOptions

if TYPE_CHECKING:
    from sae_runner.commands.pipeline import Pipeline

log = logging.getLogger("sae_runner")
KEY = "trainer.objective"
LOCAL = {"type": "local"}
"""What runs minimised before there was a choice."""


def options_of(pipeline: "Pipeline") -> dict[str, Any]:
    """The block of options, with a type that there is and keys that it takes.

    Raises:
        ConfigError: it is none.
    """
    chosen = pipeline.cfg["trainer"].get("objective", LOCAL)
    if not isinstance(chosen, Mapping):
        hint = did_you_mean(str(chosen), OBJECTIVES.names())
        raise ConfigError(f"{KEY}={chosen}: choose with trainer/objective=NAME.{hint}")
    OBJECTIVES.check(chosen, KEY)
    return dict(chosen)


def runs_the_model(pipeline: "Pipeline") -> bool:
    """Whether steps are taken on inputs, which the model is run on, and not on stored rows."""
    kind: type[Objective] = OBJECTIVES[str(options_of(pipeline)["type"])]
    return kind.on_inputs


def build(pipeline: "Pipeline", sae: SAE, model: Model | None) -> Objective:
    """The objective; `model` is needed only where steps run one."""
    objective: Objective = OBJECTIVES.build(
        options_of(pipeline), KEY, sae=sae, model=model, site=pipeline.site,
        selection=pipeline.selection,
    )  # fmt: skip
    return objective


def check(pipeline: "Pipeline", sae: SAE) -> None:
    """Refuse what cannot be trained so, before anything is made or weights are read.

    Raises:
        ConfigError: the SAE, site, tokens, model, store or dataset does not go with the objective.
    """
    if not runs_the_model(pipeline):
        return
    store, raw = pipeline.store_options, pipeline.raw_dataset
    if store.kind != "disk":
        raise ConfigError(
            f"store={store.kind}: trainer/objective=e2e reads statistics, thresholds and "
            "evaluation from stored rows; use store=disk"
        )
    if store.max_norm_multiple is not None:
        raise ConfigError(
            f"store.max_norm_multiple={store.max_norm_multiple:g}: trainer/objective=e2e replaces "
            "every selected token, outliers too; set it to null"
        )
    if not raw.random_access and getattr(raw, "kind", None) != "corpus":  # Which is packed first.
        ShuffledInputs.refuse(raw)
    build(pipeline, sae, pipeline.shapes)


def whole_examples(options: TrainOptions, n_rows: int) -> TrainOptions:
    """The `trainer` group with a batch size that is a multiple of the rows of an example.

    Raises:
        ConfigError: a batch has no room for one example.
    """
    n = options.batch_size // n_rows
    if n < 1:
        raise ConfigError(
            f"trainer.batch_size={options.batch_size}: trainer/objective=e2e takes whole examples, "
            f"and one gives up to {n_rows} rows; set it to {n_rows} or more"
        )
    return replace(options, batch_size=n * n_rows)


def build_both(
    pipeline: "Pipeline", sae: SAE, store: Activations
) -> tuple[Objective, Source | None]:
    """The objective and where its batches come from; None for the store.

    Raises:
        StoreError: the model or its data are not those of the store.
    """
    if not runs_the_model(pipeline):
        return build(pipeline, sae, None), None
    model, dataset, folder = pipeline.model, pipeline.dataset, pipeline.store_dir
    written = read_json(folder / "store.json", STORE_SCHEMA, "activation store")
    check_same_source(folder, written, model.fingerprint(), dataset.fingerprint())
    inputs = ShuffledInputs(
        model, dataset, pipeline.site, pipeline.selection, n_rows=store.n_rows("train"),
        workers=pipeline.loading.workers,
    )  # fmt: skip
    n = inputs.n_examples(pipeline.train_options.batch_size)
    log.info("end to end: %d examples a step, of %.4g rows on average", n, inputs.rows_per_example)
    return build(pipeline, sae, model), inputs
