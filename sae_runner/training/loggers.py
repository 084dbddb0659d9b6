"""Where metrics go besides metrics.jsonl: tensorboard or wandb, extras that nobody needs."""

import importlib.util
from pathlib import Path
from typing import Any, Literal

from sae_runner.errors import ConfigError
from sae_runner.training.journal import LogSink


def build_sinks(
    run_dir: Path,
    config: dict[str, Any],
    *,
    type: Literal["none", "tensorboard", "wandb"],
    project: str | None = None,
    mode: Literal["online", "offline", "disabled"] = "online",
) -> tuple[LogSink, ...]:
    """Functions that take each line of metrics.

    Raises:
        ConfigError: the package is not installed.
    """
    require_ready(type, mode)
    if type == "none":
        return ()
    if type == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer: Any = None

        def to_tensorboard(row: dict[str, float]) -> None:
            nonlocal writer
            at = int(row["n_tokens"])
            if writer is None:  # Where a resumed run begins, what was drawn beyond is forgotten.
                writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=at)
            for name, value in row.items():
                writer.add_scalar(name, value, at)
            writer.flush()

        return (to_tensorboard,)
    import wandb

    # A run resumed by re-typing the command continues the same curve: its id is the run's name.
    # Jobs of a sweep may be in this process one after another, or side by side.
    try:
        run = wandb.init(
            project=project, id=run_dir.name, name=run_dir.name, dir=str(run_dir), config=config,
            resume="allow", mode=mode, reinit="create_new",
        )  # fmt: skip
    except Exception as error:  # No key, no network: whatever it is, it is one line here.
        reason = (str(error).splitlines() or [error.__class__.__name__])[0]
        raise ConfigError(f"logger=wandb: {reason}; logger.mode=offline needs no account") from None
    return (lambda row: run.log(row, step=int(row["step"])),)


def require_ready(type: str, mode: str = "online") -> None:
    """Refuse a logger whose package or key is absent, before anything is computed.

    Raises:
        ConfigError: the package is not installed, or nobody is logged in.
    """
    spec = None if type == "none" else importlib.util.find_spec(type)
    # A folder of that name, as wandb leaves one where it runs, has a spec but no file.
    if type != "none" and (spec is None or spec.origin is None):
        raise ConfigError(f"logger={type}: not installed; pip install 'sae-runner[{type}]'")
    if type == "wandb" and mode == "online":
        import wandb

        if not wandb.login(prompt=False):
            raise ConfigError(
                "logger=wandb: no API key: `wandb login` or WANDB_API_KEY; logger.mode=offline "
                "needs no account"
            )
