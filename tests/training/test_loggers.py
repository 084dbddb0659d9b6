import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from sae_runner.errors import ConfigError
from sae_runner.training.loggers import build_sinks, require_ready

ROWS = [{"step": t, "n_tokens": 10.0 * t, "loss": 1.0 / t} for t in (3, 4)]


def test_none_is_nothing(tmp_path):
    assert build_sinks(tmp_path, {}, type="none") == ()
    require_ready("none")


@pytest.mark.parametrize("type", ["tensorboard", "wandb"])
@pytest.mark.parametrize("spec", [None, types.SimpleNamespace(origin=None)])
def test_an_absent_package_is_one_line_that_names_its_extra(tmp_path, monkeypatch, type, spec):
    """A folder of the package's name where the command runs is not the package."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    line = rf"^logger={type}: not installed; pip install 'sae-runner\[{type}\]'$"
    with pytest.raises(ConfigError, match=line):
        build_sinks(tmp_path, {}, type=type)
    with pytest.raises(ConfigError, match=line):
        require_ready(type)


def present(monkeypatch: pytest.MonkeyPatch, **modules: Any) -> None:
    found = types.SimpleNamespace(origin="somewhere")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name.replace("_", "."), module)


def test_tensorboard_gets_every_number_and_forgets_what_a_resume_repeats(tmp_path, monkeypatch):
    made, written = [], []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            made.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, at: int) -> None:
            written.append((name, value, at))

        def flush(self) -> None:
            written.append("flush")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    present(monkeypatch, torch_utils_tensorboard=module)
    (sink,) = build_sinks(tmp_path, {}, type="tensorboard")
    assert made == []  # No file before there is something to say.
    for row in ROWS:
        sink(row)
    assert made == [(str(tmp_path / "tensorboard"), 30)]
    assert written[:4] == [("step", 3, 30), ("n_tokens", 30.0, 30), ("loss", 1 / 3, 30), "flush"]
    assert ("loss", 1 / 4, 40) in written and written[-1] == "flush"


def test_an_absent_key_is_said_before_anything_is_computed(monkeypatch):
    module = types.ModuleType("wandb")
    asked = []
    module.login = lambda prompt: asked.append(prompt)  # None: nobody is logged in.
    present(monkeypatch, wandb=module)
    with pytest.raises(ConfigError, match=r"^logger=wandb: no API key.*logger\.mode=offline"):
        require_ready("wandb", "online")
    assert asked == [False]
    require_ready("wandb", "offline")
    module.login = lambda prompt: True
    require_ready("wandb", "online")


def test_a_resumed_run_goes_on_with_its_wandb_curve(tmp_path, monkeypatch):
    begun, logged = {}, []

    class Run:
        def log(self, row: dict[str, float], step: int) -> None:
            logged.append((row, step))

    def init(**options: Any) -> Run:
        begun.update(options)
        return Run()

    module = types.ModuleType("wandb")
    module.init = init
    present(monkeypatch, wandb=module)
    run_dir = Path(tmp_path / "toy-topk-12345678")
    (sink,) = build_sinks(run_dir, {"seed": 0}, type="wandb", project="p", mode="offline")
    for row in ROWS:
        sink(row)
    assert begun["id"] == begun["name"] == "toy-topk-12345678" and begun["resume"] == "allow"
    assert (begun["project"], begun["mode"], begun["config"]) == ("p", "offline", {"seed": 0})
    # A second run in this process, as in a sweep, must not be logged into the first.
    assert begun["reinit"] == "create_new"
    assert logged == [(ROWS[0], 3), (ROWS[1], 4)]
