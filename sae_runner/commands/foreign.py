"""Another library's SAE as a run of its own, so that it is measured and compared as ours are."""

import logging
import re
from pathlib import Path
from typing import Any

from sae_runner import __version__, files
from sae_runner.checkpoint import find_checkpoint, load_sae, read_facts, save_checkpoint
from sae_runner.commands.job import Job
from sae_runner.commands.options import GROUPS
from sae_runner.commands.origin import origin
from sae_runner.commands.pipeline import Pipeline
from sae_runner.config import preset
from sae_runner.errors import ConfigError, StoreError

log = logging.getLogger("sae_runner")
GROUP = re.compile(rf"[+~]*({'|'.join(GROUPS)})[.=@]")
"""An override of what an SAE is measured on."""
STEP = "step_00000000"
WITHOUT_TRAINING = {"trainer": preset("trainer", "default"), "logger": preset("logger", "none")}
"""What a pipeline asks for and a run that was not trained here has no record of."""


def foreign_pipeline(folder: Path, job: Job) -> Pipeline:
    """The activations that the command names, and the SAE of a foreign folder.

    Raises:
        ConfigError: no model is named, or the SAE is of another width than the site.
    """
    asked, facts = job.cfg["checkpoint"], read_facts(folder)
    if "model" not in job.choices:
        known = {key: facts["origin"][key] for key in ("model", "hook") if facts["origin"][key]}
        says = "".join(f"; it says {key} {value}" for key, value in known.items())
        raise ConfigError(
            f"checkpoint={asked}: name whose activations it is measured on with model=…{says}"
        )
    site = dict(job.cfg["site"])
    if facts["origin"]["site"] and not any(w.startswith("site.name=") for w in job.overrides):
        site["name"] = facts["origin"]["site"]
    cfg = {
        **{group: job.cfg[group] for group in ("model", "dataset", "store", "evaluators", "eval")},
        **WITHOUT_TRAINING,
        "site": site,
        "sae": {**facts["sae"], "dead_latents": {"type": "none"}},
        "outputs": job.cfg.get("outputs") or "outputs",
        "device": job.cfg["device"],
        "force": job.cfg["force"],
        "seed": 0,
        "init_from": str(asked),
    }
    pipeline = Pipeline(cfg, {**job.choices, "sae": facts["format"]})
    if pipeline.site.d != facts["d_in"]:
        raise StoreError(
            f"checkpoint={asked}: its d_in is {facts['d_in']}, that of {pipeline.site.name} is "
            f"{pipeline.site.d}"
        )
    return pipeline


def as_run(folder: Path, run_dir: Path, pipeline: Pipeline, job: Job) -> Path:
    """Keep the SAE as the one checkpoint of a run, with latents as its library has them."""
    from omegaconf import OmegaConf

    checkpoint, facts = run_dir / "checkpoints" / STEP, read_facts(folder)
    source = {"format": facts["format"], "sha256": facts["sha256"]["sae.safetensors"],
              "origin": facts["origin"]}  # fmt: skip
    try:
        if read_facts(checkpoint)["source"] == source:
            return checkpoint
    except (StoreError, KeyError):
        pass
    log.info("%s SAE of %s is measured at %s", facts["format"], folder, pipeline.site.name)
    whose: dict[str, Any] = origin(pipeline, pipeline.open_store())
    record = {
        **{key: value for key, value in pipeline.cfg.items() if key not in WITHOUT_TRAINING},
        "choices": pipeline.choices,
        "overrides": job.overrides,
        "identity": pipeline.run_identity,
        "code_version": __version__,
    }
    files.write_text(run_dir / "config.yaml", OmegaConf.to_yaml(record))
    save_checkpoint(
        checkpoint, load_sae(folder), {"step": 0, "n_tokens": 0, **whose, "source": source},
        fold=False,
    )  # fmt: skip
    return find_checkpoint(checkpoint)
