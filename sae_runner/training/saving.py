"""What a trainer leaves on disk, and how another goes on from there with the same bits."""

import logging
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae_runner import files
from sae_runner.checkpoint import save_checkpoint, step_dirs
from sae_runner.errors import StoreError
from sae_runner.store.activations import Position

if TYPE_CHECKING:
    from sae_runner.training.trainer import Trainer

log = logging.getLogger("sae_runner")


def save(trainer: "Trainer", wait_s: float) -> None:
    """See `Trainer.save`."""
    folder = trainer.run_dir / "checkpoints" / f"step_{trainer.step:08d}"
    if trainer.step == trainer.saved_step and folder.is_dir():
        return
    trainer.guardrails.check_weights(trainer.step)
    last = trainer.step == trainer.options.n_steps
    used = trainer.for_inference(is_kept=last or trainer.step in trainer.keep_at)
    trainer.used = used if last else trainer.sae
    trainer.journal.timings(trainer.step, wait_s)
    trainer.journal.flush()  # On disk before the step they reach to.
    keep_state = not last or trainer.options.keep_state
    n_tokens = trainer.step * trainer.options.batch_size
    save_checkpoint(
        folder,
        trainer.sae,
        {**trainer.facts, "step": trainer.step, "n_tokens": n_tokens},
        state=state_of(trainer) if keep_state else None,
        optimizer=tensors_of(trainer) if keep_state else None,
        used=used,
    )
    kept = trainer.keep_at | {trainer.step}
    if not last:
        kept.add(trainer.saved_step)
    trainer.saved_step, trainer.saved_at = trainer.step, time.monotonic()
    for other in step_dirs(trainer.run_dir):
        if int(other.name[5:]) not in kept:
            files.remove(other)
    log.debug("saved %s", folder)


def state_of(trainer: "Trainer") -> dict[str, Any]:
    """What a resume needs besides tensors."""
    state: dict[str, Any] = {"step": trainer.step, "position": asdict(trainer.position)}
    state["arithmetic"] = arithmetic(trainer)
    if trainer.target_l0 is not None:
        state["target_l0"] = trainer.target_l0.state()
    return state


def arithmetic(trainer: "Trainer") -> str:
    """What decides how sums are rounded, besides the numbers: the same bits need the same."""
    if trainer.device.type != "cpu":
        return trainer.device.type + (", recorded" if trainer.options.cuda_graph else "")
    n = torch.get_num_threads()
    return f"cpu, {n} thread{'s' if n > 1 else ''}"


def tensors_of(trainer: "Trainer") -> dict[str, Tensor]:
    """What a resume needs besides the weights."""
    tensors = {"dead.rows_since_fired": trainer.dead.rows_since_fired}
    if trainer.averaged is not None:
        tensors |= trainer.averaged.tensors()
    for name, parameter in trainer.sae.named_parameters():
        for slot, value in trainer.optimizer.state[parameter].items():
            tensors[f"{name}/{slot}"] = value
    return tensors


def restore(
    trainer: "Trainer",
    state: dict[str, Any],
    weights: dict[str, Tensor],
    optimizer: dict[str, Tensor],
) -> None:
    """See `Trainer.restore`."""
    try:
        _take(trainer, state, weights, optimizer)
        trainer.position = Position(**state["position"])
        before, now = state.get("arithmetic"), arithmetic(trainer)
        if before not in (None, now):
            log.warning(
                "going on with %s from a checkpoint made with %s: rounding differs, so the "
                "result will differ in its last bits", now, before,
            )  # fmt: skip
        # Last: what failed before begins anew.
        trainer.step = trainer.saved_step = state["step"]
    except KeyError as error:
        raise StoreError(f"checkpoint of step {state.get('step')} lacks {error}") from None
    trainer.journal.go_back_to(trainer.step)


def _take(
    trainer: "Trainer",
    state: dict[str, Any],
    weights: dict[str, Tensor],
    optimizer: dict[str, Tensor],
) -> None:
    trainer.sae.load_tensors(weights)
    trainer.dead.rows_since_fired.copy_(optimizer.pop("dead.rows_since_fired"))
    trainer.begin_average()
    if trainer.averaged is not None:
        trainer.averaged.restore(optimizer)
    if trainer.target_l0 is not None:
        trainer.target_l0.restore(state["target_l0"])
    for name, parameter in trainer.sae.named_parameters():
        slots = {k.split("/")[1]: v for k, v in optimizer.items() if k.startswith(name + "/")}
        trainer.optimizer.state[parameter] = {
            k: v if k == "step" and trainer.device.type == "cpu" else v.to(trainer.device)
            for k, v in slots.items()
        }
