"""What plainly cannot be done on this machine, refused before anything is made."""

from sae_runner import files
from sae_runner.commands import memory
from sae_runner.commands.cache import require_space
from sae_runner.commands.pipeline import Pipeline
from sae_runner.config import resolve_device
from sae_runner.saes.base import SAE
from sae_runner.training.options import TrainOptions


def require_room(pipeline: Pipeline) -> None:
    """Refuse a run whose store, checkpoints or weights cannot fit.

    What may fit is not refused: of text, whose rows are known once it is packed, nothing of the
    store counts, and of memory only what is held whatever the estimate is worth.

    Raises:
        InputError: the first thing that cannot, with the key to lower.
    """
    to_come = require_space(pipeline)
    checkpoints = pipeline.run_dir / "checkpoints"
    options = pipeline.train_options
    if (checkpoints / f"step_{options.n_steps:08d}").is_dir() and not pipeline.root.force:
        return  # Trained already.
    sae = pipeline.build_sae(pipeline.site.d, device="meta")
    there = files.folder_bytes(checkpoints) if checkpoints.is_dir() else 0
    to_come += max(0, checkpoint_bytes(options, sae) - there)
    key = "trainer.checkpoints" if options.checkpoint_steps() else memory.width_key(sae)
    files.require_space(pipeline.outputs, to_come, "store and checkpoints need", f"or lower {key}")
    device = resolve_device(pipeline.root.device)
    memory.require("training", memory.training(pipeline, sae, rows_for_sure(pipeline)), device)


def rows_for_sure(pipeline: Pipeline) -> int:
    """Training rows that there will be at least."""
    if pipeline.raw_dataset.modality == "text":
        return 0
    return len(pipeline.raw_dataset.ids("train")) * pipeline.rows_per_example(pipeline.site)


def checkpoint_bytes(options: TrainOptions, sae: SAE) -> int:
    """What the checkpoints of a run take: weights, the state of each that keeps one."""
    weights = sum(p.numel() * p.element_size() for p in sae.parameters())
    # A state is the weights again and Adam's two moments.
    with_state = len(options.checkpoint_steps()) + options.keep_state
    return weights * (len(options.checkpoint_steps()) + 1) + 3 * weights * with_state
