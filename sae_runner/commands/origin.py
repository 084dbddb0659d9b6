"""Whose activations a checkpoint is of, kept in its cfg.json."""

from typing import Any

from sae_runner.commands.pipeline import Pipeline
from sae_runner.store.manifest import n_missing
from sae_runner.store.reader import Activations, ActivationStore


def origin(pipeline: Pipeline, store: Activations) -> dict[str, Any]:
    """Whose activations a checkpoint is trained on."""
    if isinstance(store, ActivationStore):
        source = store.source
        n_bad = source["dataset"].get("n_unreadable", 0) + len(store.manifest["unreadable"])
        model, dataset = source["model"], {**source["dataset"], "n_unreadable": n_bad}
        n = n_missing(
            pipeline.selection.rows_asked, store.manifest["splits"],
            len(store.manifest["unreadable"]),
        )  # fmt: skip
        dataset |= {"n_missing_rows": n} if n else {}
        where = str(store.folder)
    else:
        model = {"name": pipeline.choices["model"], "fingerprint": pipeline.model.fingerprint(),
                 **pipeline.model.describe()}  # fmt: skip
        dataset = {**pipeline.dataset.describe(), "name": pipeline.choices["dataset"]}
        where = "stream"
    return {
        "model": model,
        "dataset": dataset,
        "site": pipeline.site.name,
        **({} if pipeline.target is None else {"target": pipeline.target.name}),
        "tokens": pipeline.selection.slug,
        "store": where,
    }
