"""The loop that trains a network here: stopped at any moment, it goes on to the same bits.

What it needs to go on lies in a folder until the training is done:

    <kept>/{state.safetensors, state.json}
"""

import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from sae_runner import files, signals
from sae_runner.errors import ConfigError
from sae_runner.log import Progress

TENSORS, FACTS = "state.safetensors", "state.json"
SAVE_EVERY_S = 60.0

log = logging.getLogger("sae_runner")


def fit(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Int64[Tensor, " batch"]],
    loss_of: Callable[[Int64[Tensor, " batch"]], Tensor],
    lr_factor: Callable[[int], float],
    *,
    n_steps: int,
    kept: Path,
    what: str,
    max_grad_norm: float = math.inf,
    generators: Sequence[torch.Generator] = (),
) -> list[float]:
    """Train `network` in place; the loss of every step.

    Args:
        network: in training mode while this runs, in inference mode afterwards.
        optimizer: of its parameters, at the peak of the learning rate.
        batches: rows of each step, drawn anew from their own generator wherever this begins.
        loss_of: the mean loss on these rows.
        lr_factor: share of the peak at each step.
        n_steps: how many.
        kept: folder for what a later call needs to go on; left there when this is stopped.
        what: is trained; begins the lines of progress.
        max_grad_norm: gradients are scaled down to it.
        generators: that `loss_of` draws from.

    Raises:
        Interrupted: the process was asked to stop; the same call goes on.
        ConfigError: the loss is not finite.
    """
    peaks = [group["lr"] for group in optimizer.param_groups]
    losses = resume(kept, network, optimizer, generators)
    if losses:
        log.info("%s: going on from step %d of %d", what, len(losses), n_steps)
    saved_at = time.monotonic()
    network.train()
    progress = Progress(f"train {what}", n_steps, "steps", done=len(losses))
    with progress, signals.deferred() as stop:
        for rows in itertools.islice(batches, len(losses), n_steps):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * lr_factor(len(losses))
            loss = loss_of(rows)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(network.parameters(), max_grad_norm)
            optimizer.step()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                files.remove(kept)
                step = len(losses)
                raise ConfigError(f"model.learning_rate={peaks[0]:g}: diverged at step {step}")
            progress.advance(1, f"loss {losses[-1]:.3f}")
            if stop or time.monotonic() - saved_at > SAVE_EVERY_S:
                save(kept, network, optimizer, generators, losses, n_steps)
                saved_at = time.monotonic()
            if stop:
                stop.interrupt(
                    f"stopped at step {len(losses)} of {n_steps} of the training of {what}; "
                    "type the same command to go on"
                )
    network.eval()
    return losses


def state_of(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, shared ones once."""
    return dict(itertools.chain(network.named_parameters(), network.named_buffers()))


def save(
    kept: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    generators: Sequence[torch.Generator],
    losses: Sequence[float],
    n_steps: int,
) -> None:
    """Write all that `resume` reads."""
    tensors = {f"network/{name}": tensor.detach() for name, tensor in state_of(network).items()}
    slots: dict[int, dict[str, Tensor]] = optimizer.state_dict()["state"]
    tensors |= {f"optimizer/{i}/{k}": v for i, slot in slots.items() for k, v in slot.items()}
    tensors |= {f"generator/{i}": g.get_state() for i, g in enumerate(generators)}
    with files.atomic(kept) as temporary:
        files.write_tensors(temporary / TENSORS, tensors)
        facts = {"losses": list(losses), "n_steps": n_steps}
        files.write_json(temporary / FACTS, {**facts, "sha256": files.sha256(temporary / TENSORS)})


def resume(
    kept: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    generators: Sequence[torch.Generator],
) -> list[float]:
    """Put back what `save` wrote; the losses so far, none where there is nothing sound to read."""
    from safetensors.torch import load_file

    if not (kept / FACTS).is_file():
        return []
    try:
        facts = json.loads((kept / FACTS).read_text())
        if facts["sha256"] != files.sha256(kept / TENSORS):
            raise ValueError("not the bytes that it was written with")
    except (ValueError, KeyError, OSError) as error:
        log.warning("%s is damaged (%s): the training begins again", kept, error)
        return []
    tensors = load_file(kept / TENSORS)
    with torch.no_grad():
        for name, tensor in state_of(network).items():
            tensor.copy_(tensors[f"network/{name}"])
    slots: dict[int, dict[str, Any]] = {}
    for key in (key for key in tensors if key.startswith("optimizer/")):
        _, index, slot = key.split("/")
        slots.setdefault(int(index), {})[slot] = tensors[key]
    optimizer.load_state_dict(optimizer.state_dict() | {"state": slots})
    for i, generator in enumerate(generators):
        generator.set_state(tensors[f"generator/{i}"])
    losses: list[float] = facts["losses"]
    return losses
