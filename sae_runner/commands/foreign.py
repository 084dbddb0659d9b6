"""An SAE as a run of its own on activations that a command names: another library's, or ours.

It is measured and compared as those are that were trained here.
"""

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
from sae_runner.interchange import recognise

log = logging.getLogger("sae_runner")
GROUP = re.compile(rf"[+~]*({'|'.join(GROUPS)})[.=@]")
"""An override of what an SAE is measured on."""
STEP = "step_00000000"
WITHOUT_TRAINING = {"trainer": preset("trainer", "default"), "logger": preset("logger", "none")}
"""What a pipeline asks for and a run that was not trained here has no record of."""


def is_elsewhere(folder: Path, job: Job) -> bool:
    """Whether a checkpoint is measured on activations that the command names."""
    return recognise(folder) is not None or "model" in job.choices


def facts_of(folder: Path) -> dict[str, Any]:
    """`read_facts`; of one of ours too a format, an origin and the tokens that it takes."""
    facts = read_facts(folder)
    if "format" in facts:
        return facts
    origin = {"model": facts["model"]["name"], "hook": None, "site": facts["site"]}
    return {**facts, "format": "sae_runner", "origin": origin}


def foreign_pipeline(folder: Path, job: Job) -> Pipeline:
    """The activations that the command names, and the SAE of a foreign folder.

    Raises:
        ConfigError: no model is named, or the SAE is of another width than the site.
    """
    asked, facts = job.cfg["checkpoint"], facts_of(folder)
    if "model" not in job.choices:
        known = {key: facts["origin"][key] for key in ("model", "hook") if facts["origin"][key]}
        says = "".join(f"; it says {key} {value}" for key, value in known.items())
        raise ConfigError(
            f"checkpoint={asked}: name whose activations it is measured on with model=…{says}"
        )
    site = dict(job.cfg["site"])
    if facts["origin"]["site"] and not any(w.startswith("site.name=") for w in job.overrides):
        site["name"] = facts["origin"]["site"]
    ours = facts["format"] == "sae_runner"
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
    name = facts["sae"]["type"] if ours else facts["format"]
    pipeline = Pipeline(cfg, {**job.choices, "sae": name})
    if ours and pipeline.selection.slug != facts["tokens"]:
        log.warning(
            "site.tokens: it was trained on tokens %s, and is measured on %s",
            facts["tokens"], pipeline.selection.slug,
        )  # fmt: skip
    if pipeline.site.d != facts["d_in"]:
        raise StoreError(
            f"checkpoint={asked}: its d_in is {facts['d_in']}, that of {pipeline.site.name} is "
            f"{pipeline.site.d}"
        )
    return pipeline


def as_run(folder: Path, run_dir: Path, pipeline: Pipeline, job: Job) -> Path:
    """Keep the SAE as the one checkpoint of a run, with latents as its library has them."""
    from omegaconf import OmegaConf

    checkpoint, facts = run_dir / "checkpoints" / STEP, facts_of(folder)
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
