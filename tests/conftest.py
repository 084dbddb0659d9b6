import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# No test may reach a hub, whoever started it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

pytest_plugins = ["sae_fixtures", "host_fixtures"]
Finished = subprocess.CompletedProcess[str]


@pytest.fixture
def data_dir() -> Path:
    """The folder of real data; tests that use it are marked `data`."""
    folder = os.environ.get("SAE_RUNNER_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("SAE_RUNNER_DATA names no folder")
    return Path(folder)


def sae_run_process(*words: str, cwd: Path, timeout: float = 300) -> Finished:
    """`sae-run WORDS` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "sae_runner", *words],
        cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


@pytest.fixture
def sae_run(tmp_path: Path) -> Callable[..., Finished]:
    """`sae_run("train", "model=toy")` in an empty folder; outputs are in tmp_path/outputs."""
    return lambda *words, **options: sae_run_process(*words, cwd=tmp_path, **options)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """`sae-run WORDS` in this process, in an empty folder: the exit code."""
    import logging
    import signal

    from sae_runner.cli import main

    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    root = logging.getLogger()
    before, level = list(root.handlers), root.level

    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["sae-run", *words])
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0) if not isinstance(stop.code, str) else 1
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            root.handlers[:] = before
            root.setLevel(level)
            logging.captureWarnings(False)
        return 0

    return run
