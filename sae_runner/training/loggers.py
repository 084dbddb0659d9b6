"""Where metrics go besides metrics.jsonl: tensorboard or wandb, extras that nobody needs."""

from pathlib import Path
from typing import Any, Literal

from sae_runner.errors import ConfigError
from sae_runner.training.trainer import LogSink


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
    if type == "none":
        return ()
    try:
        if type == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
        else:
            import wandb
    except ImportError:
        raise ConfigError(
            f"logger={type}: not installed; pip install 'sae-runner[{type}]'"
        ) from None
    if type == "tensorboard":
        writer = SummaryWriter(str(run_dir / "tensorboard"))  # type: ignore[no-untyped-call]

        def to_tensorboard(row: dict[str, float]) -> None:
            for name, value in row.items():
                writer.add_scalar(name, value, int(row["n_tokens"]))  # type: ignore[no-untyped-call]
            writer.flush()  # type: ignore[no-untyped-call]

        return (to_tensorboard,)
    # A run resumed by re-typing the command continues the same curve: its id is the run's name.
    run = wandb.init(
        project=project, id=run_dir.name, name=run_dir.name, dir=str(run_dir), config=config,
        resume="allow", mode=mode,
    )  # fmt: skip
    return (lambda row: run.log(row, step=int(row["step"])),)
