import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sae_runner.commands.job import Job

SMALL = (
    "model=toy", "dataset.n_examples=3000", "dataset.d=16", "dataset.n_features=32",
    "trainer.n_tokens=2048", "trainer.batch_size=256", "trainer.dead_window=512",
    "evaluators=[sparsity,reconstruction]", "store.window_rows=1000",
)  # fmt: skip

ComposeJob = Callable[..., Job]
Write = Callable[..., Path]


def composed(command: str, *words: str) -> Job:
    from sae_runner.composition import composed_jobs

    (job,) = composed_jobs(command, list(words))
    return job


@pytest.fixture(scope="session")
def small() -> tuple[str, ...]:
    """Overrides of a run that takes a moment: 2,700 + 300 rows of 16, 8 steps."""
    return SMALL


@pytest.fixture(scope="session")
def compose_job() -> ComposeJob:
    """`compose_job("plan", "model=toy")`: what Hydra would hand to the command."""
    return composed


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An `outputs` with one toy store and one finished run; not to be changed."""
    from sae_runner.commands import train

    outputs = tmp_path_factory.mktemp("trained") / "outputs"
    train.main(composed("train", *SMALL, f"outputs={outputs}"))
    return outputs


@pytest.fixture
def outputs(trained: Path, tmp_path: Path) -> Path:
    """A copy of `trained` that may be changed."""
    return Path(shutil.copytree(trained, tmp_path / "outputs"))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write("models/a/facts.json", {…})` below tmp_path/outputs; text as it is."""

    def write(name: str, value: Any = "") -> Path:
        path = tmp_path / "outputs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        return path

    return write


@pytest.fixture
def snapshot() -> Callable[[Path], dict[str, tuple[int, int]]]:
    """Every path below a folder, with its size and the time of its last change."""

    def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
        paths = [folder, *sorted(folder.rglob("*"))]
        return {str(p): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in paths}

    return snapshot
