"""`sae-run train`: cache if need be, train an SAE, evaluate it; each step skips what is there."""

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sae_runner import __version__, files
from sae_runner.checkpoint import (
    build_sae,
    find_checkpoint,
    load_sae,
    load_state,
    read_facts,
    step_dirs,
)
from sae_runner.commands import objectives
from sae_runner.commands.cache import ensure_store
from sae_runner.commands.caveats import warnings_about
from sae_runner.commands.eval import evaluate, run_record
from sae_runner.commands.job import Job
from sae_runner.commands.limits import require_room
from sae_runner.commands.origin import origin
from sae_runner.commands.pipeline import Pipeline
from sae_runner.config import checked_options, construct, resolve_device
from sae_runner.errors import ConfigError, StoreError
from sae_runner.interchange.base import centred
from sae_runner.log import log_to, working
from sae_runner.saes.base import SAE
from sae_runner.store.reader import Activations, ActivationStore
from sae_runner.training.loggers import build_sinks, require_ready
from sae_runner.training.trainer import Trainer

log = logging.getLogger("sae_runner")


def check(job: Job) -> None:
    """Refuse what can be refused ahead."""
    check_composition(job)
    require_room(Pipeline(job.cfg, job.choices))


def check_sweep(jobs: Sequence[Job]) -> None:
    """Refuse jobs of one sweep that would write different runs into one folder.

    Raises:
        ConfigError: `run_name` is the same, and the configuration is not.
    """
    first: dict[Path, Any] = {}
    for job in jobs:
        if job.cfg["run_name"] is None:  # Else the name follows from the configuration.
            continue
        pipeline = Pipeline(job.cfg, job.choices)
        identity = pipeline.run_identity
        if first.setdefault(pipeline.run_dir, identity) != identity:
            raise ConfigError(
                f"run_name={pipeline.root.run_name}: jobs of different configurations would share "
                "it; leave it out, or put what is swept in it: 'run_name=name${seed}'"
            )


def check_composition(job: Job) -> None:
    """Refuse what no machine could run."""
    pipeline = Pipeline(job.cfg, job.choices)
    pipeline.check()
    check_one_k(job)
    logger = checked_options(build_sinks, pipeline.cfg["logger"], where="logger")
    require_ready(logger["type"], logger.get("mode", "online"))
    if source := pipeline.root.init_from:
        check_start(source, pipeline)
    if not pipeline.root.force:
        check_same_run(pipeline)


def check_one_k(job: Job) -> None:
    """Refuse k typed under both of its names.

    Raises:
        ConfigError: `sae.k` and `sae.target_l0` are both given.
    """
    sae, typed = job.cfg["sae"], {word.split("=")[0].lstrip("+") for word in job.overrides}
    if {"sae.k", "sae.target_l0"} <= typed and sae.get("target_l0") not in (None, sae.get("k")):
        raise ConfigError(
            f"sae.k={sae['k']} and sae.target_l0={sae['target_l0']}: two names of one number here; "
            "give one"
        )


def check_same_run(pipeline: Pipeline) -> dict[str, Any] | None:
    """The record of the run that is there, if there is one.

    Raises:
        ConfigError: it is of another configuration.
    """
    path = pipeline.run_dir / "config.yaml"
    if not path.is_file():
        return None
    old = run_record(pipeline.run_dir)
    if old["identity"] != pipeline.run_identity:
        name = pipeline.run_dir.name
        raise ConfigError(
            f"run_name={name}: there is a run of another configuration; give another name, or "
            "force=true to replace it"
        )
    return old


@working("train")
def main(job: Job) -> None:
    """Run a composed config to its report."""
    check(job)
    pipeline = Pipeline(job.cfg, job.choices)
    run_dir, force = pipeline.run_dir, pipeline.root.force
    if pipeline.store_options.kind == "disk":
        ensure_store(pipeline)
        pipeline.release_model()
    with files.locked(run_dir):
        make_room(run_dir, force)
        try:
            with log_to(run_dir / "run.log"):
                begin_run(run_dir, pipeline, job)
                train(run_dir, pipeline)
                evaluate(run_dir, pipeline, force=False)
        except Exception:
            remove_if_empty(run_dir)
            raise
    log.info("run %s", run_dir)


def make_room(run_dir: Path, force: bool) -> None:
    """The folder of a run, without what a killed process left half-written."""
    if force:
        files.remove(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    files.remove_partials(run_dir)


def remove_if_empty(run_dir: Path) -> None:
    """Remove the folder of a run that failed before its first line of metrics."""
    if {path.name for path in run_dir.iterdir()} <= {"config.yaml", "run.log", "wandb"}:
        files.remove(run_dir)
        files.lock_path(run_dir).unlink(missing_ok=True)


def begin_run(run_dir: Path, pipeline: Pipeline, job: Job) -> None:
    """Write config.yaml, or check that the run there is of the same configuration."""
    from omegaconf import OmegaConf

    record = {
        **pipeline.cfg,
        "choices": pipeline.choices,
        "overrides": job.overrides,
        "identity": pipeline.run_identity,
        "code_version": __version__,
    }
    if old := check_same_run(pipeline):
        if old["code_version"] != __version__:
            log.warning("%s was begun by version %s", run_dir.name, old["code_version"])
        record["code_version"] = old["code_version"]
    path = run_dir / "config.yaml"
    files.write_text(path, OmegaConf.to_yaml(record))


def finished(run_dir: Path, n_steps: int) -> Path | None:
    """The last checkpoint, if training got to its end."""
    for folder in reversed(step_dirs(run_dir)):
        try:
            if read_facts(folder)["step"] == n_steps:
                return folder
        except StoreError as error:
            log.warning("%s; the checkpoint before it is used", error)
    return None


def is_trained(run_dir: Path, pipeline: Pipeline) -> bool:
    """Whether training got to its end; says so, and what was asked for too late."""
    options = pipeline.train_options
    if folder := finished(run_dir, options.n_steps):
        log.info("training is done: %s", folder)
        kept = {int(p.name.removeprefix("step_")) for p in step_dirs(run_dir)}
        wanted = options.checkpoint_steps()
        if options.checkpoint_interventions:
            sae = pipeline.build_sae(pipeline.site.d, device="meta")
            wanted |= pipeline.build_dead_latents(sae).milestones(options.n_steps)
        if absent := sorted(wanted - kept):
            steps = ", ".join(map(str, absent))
            log.warning(
                "trainer.checkpoints came too late for steps %s: force=true trains again", steps
            )
        if options.keep_state and not (folder / "state").is_dir():
            log.warning("trainer.keep_state came too late: force=true trains again")
    return folder is not None


def train(run_dir: Path, pipeline: Pipeline) -> None:
    """Train from the start, or go on from the last sound checkpoint."""
    if is_trained(run_dir, pipeline):
        return
    trainer_of(run_dir, pipeline, pipeline.open_store()).run()


def trainer_of(run_dir: Path, pipeline: Pipeline, store: Activations) -> Trainer:
    """A trainer at the step that it goes on from, with what is odd about it said."""
    for warning in warnings_of(pipeline, store):
        log.warning(warning)
    device, options = torch.device(resolve_device(pipeline.root.device)), pipeline.train_options
    sae = pipeline.build_sae(store.d_in)
    objective, source = objectives.build_both(pipeline, sae, store)
    trainer = Trainer(
        sae,
        store,
        options,
        run_dir,
        seed=pipeline.root.seed,
        data_seed=pipeline.store_options.seed,
        device=device,
        facts=origin(pipeline, store),
        dead_latents=pipeline.dead_latents,
        objective=objective,
        source=source,
        prefetch=pipeline.store_options.prefetch,
        sinks=construct(
            build_sinks, pipeline.cfg["logger"], where="logger", run_dir=run_dir,
            config=pipeline.cfg,
        ),
    )  # fmt: skip
    with working("preparing the SAE"):
        start(trainer, run_dir, pipeline)
    log.info(
        "training %s: %d latents on %s, %d rows in %d steps from step %d, on %s",
        pipeline.choices["sae"], trainer.sae.d_sae, pipeline.site.name,
        options.n_steps * options.batch_size, options.n_steps, trainer.step, device,
    )  # fmt: skip
    return trainer


def start(trainer: Trainer, run_dir: Path, pipeline: Pipeline) -> None:
    """Restore the newest checkpoint that is sound and has its state; else draw or take weights."""
    for partial in (run_dir / "checkpoints").glob(".step_*"):
        files.remove(partial)
    for folder in reversed(step_dirs(run_dir)):
        try:
            read_facts(folder)
            trainer.restore(*load_state(folder))
        except StoreError as error:
            log.warning("%s; the checkpoint before it is used", error)
            continue
        log.info("going on from %s", folder.name)
        return
    for name in ("metrics.jsonl", "timings.jsonl"):
        (run_dir / name).unlink(missing_ok=True)
    trainer.initialise()
    if source := pipeline.root.init_from:
        take_weights(trainer.sae, check_start(source, pipeline))


def check_start(source: str, pipeline: Pipeline) -> Path:
    """The checkpoint that `init_from` means, if it fits the SAE that is to be trained.

    Raises:
        StoreError, ConfigError: none there, or of another shape or kind.
    """
    with _named("init_from", source):
        folder = find_checkpoint(source)
    facts, sae = read_facts(folder), pipeline.build_sae(pipeline.site.d, device="meta")
    scalings = facts["sae"]["input_scaling"], sae.input_scaling
    for what, found, wanted in (
        ("d_in", facts["d_in"], sae.d_in),
        ("d_sae", facts["sae"]["d_sae"], sae.d_sae),
        ("type", facts["sae"]["type"], sae.kind),
        # Every other scaling is folded into what is saved.
        ("input_scaling", *(scalings if "layer_norm" in scalings else ("", ""))),
    ):
        if found != wanted:
            raise ConfigError(f"init_from={source}: its {what} is {found}, this run's is {wanted}")
    with torch.device("meta"):
        held = dict(build_sae(facts).named_parameters())
    if lacking := [name for name, _ in sae.named_parameters() if name not in held]:
        raise ConfigError(
            f"init_from={source}: what is saved for use lacks {lacking[0]!r}, which training needs"
        )
    return folder


@torch.no_grad()
def take_weights(sae: SAE, folder: Path) -> None:
    """Start from a trained SAE: its parameters, unfolded to this run's input scale.

    Buffers (scale, loss normaliser) stay those of this run's own activations.

    Raises:
        ConfigError: the run keeps decoder rows at norm 1, and those of the SAE cannot be brought
            there without a change of its latents.
    """
    source = load_sae(folder).to(sae.b_dec.device)
    if source.apply_b_dec_to_input != sae.apply_b_dec_to_input:
        source.load_tensors(centred(source, wanted=sae.apply_b_dec_to_input))
        source.apply_b_dec_to_input = sae.apply_b_dec_to_input
    if sae.decoder_norm == "unit" and sae.input_scaling != "whitening":
        source.fold()  # Norms go into the encoder, where that changes no choice of latents.
    source.unfold_like(sae)
    if sae.decoder_norm == "unit":
        norms = source.W_dec.norm(dim=1)
        low, high = float(norms.min()), float(norms.max())
        if low < 0.99 or high > 1.01:
            raise ConfigError(
                f"init_from={folder}: norms of its decoder rows go from {low:.3g} to {high:.3g}, "
                "and sae.decoder_norm=unit would bring them to 1; set it to free"
            )
    trained = dict(source.named_parameters())
    for name, parameter in sae.named_parameters():
        parameter.copy_(trained[name])


@contextlib.contextmanager
def _named(key: str, value: str) -> Any:
    try:
        yield
    except StoreError as error:
        raise StoreError(str(error).replace(f"checkpoint={value}", f"{key}={value}")) from None


def warnings_of(pipeline: Pipeline, store: Activations) -> list[str]:
    """What to say of a run on this store before its first step."""
    n_rows = store.n_rows("train")
    if isinstance(store, ActivationStore):
        n_dropped = store.n_dropped("train") if store.max_norm_multiple else 0
        return warnings_about(pipeline, n_rows, n_dropped=n_dropped)
    return warnings_about(pipeline, n_rows, at_most=pipeline.shapes.modality == "text")
