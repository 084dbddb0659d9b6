"""Frozen networks under study, one kind of host per file; `type: name` is `models/<name>.py`."""

from typing import TYPE_CHECKING, Any

from sae_runner.config import Registry, plain

if TYPE_CHECKING:
    from sae_runner.models.base import Model

MODELS = Registry("model", "sae_runner.models")

# What every model YAML says for the runner's sake: default site and tokens, and the size of the
# batches that it is run in. No host's constructor sees them.
COMMON_KEYS = frozenset({"site", "tokens", "batch_size"})


def build_model(cfg: Any, **runtime: Any) -> "Model":
    """The host that a `model` config describes; gradients flow through its weights, not to them.

    Run-time objects a host may declare as positional parameters: `device` (torch.device), `dataset`
    (Dataset; for hosts that train here), `outputs` (Path), `meta` (bool: True builds the network
    without weights, for shapes only).
    """
    options = {k: v for k, v in plain(cfg).items() if k not in COMMON_KEYS}
    model: Model = MODELS.build(options, **runtime)
    for parameter in model.parameters():  # Or whoever wants a gradient records the whole network.
        parameter.requires_grad_(False)
    return model
