"""Who may import whom: one direction, read from the source of every module."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sae_runner"
# A room may import the rooms above it, and itself.
ROOMS = [
    {"allocator", "errors", "log", "meters", "ranks", "signals", "statistics"},
    {"config", "files", "distributed"},
    {"data"},
    {"models"},
    {"site", "splice"},
    {"saes", "kernels"},
    {"store"},
    {"interchange"},
    {"checkpoint"},
    {"evaluators", "training"},
    {"report"},
    {"commands"},
    {"composition", "explain", "command_line", "completion"},
    {"cli"},
    {"plugins"},
]
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
FORBIDDEN = {
    ("store", "saes"), ("training", "models"), ("training", "data"), ("interchange", "store"),
    ("interchange", "data"),
}  # fmt: skip
PROTOCOLS = {"models.base"}
"""What a model is, without any of them: who may not import the room may import this."""


def imports_of(path: Path) -> set[str]:
    """Rooms that a module imports when it runs (not for type checking alone)."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            names = names[1:] if node.module == "sae_runner" else names[:1]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        own = [n.removeprefix("sae_runner.") for n in names if n.startswith("sae_runner.")]
        found |= {n if n in PROTOCOLS else n.split(".")[0] for n in own}
    return found - {"__version__"}


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports_run_one_way(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room in ("__init__", "__main__"):
        return
    for other in imports_of(path) - {room}:
        assert LEVEL[other.split(".")[0]] <= LEVEL[room], f"{room} imports {other}"
        assert (room, other) not in FORBIDDEN, f"{room} imports {other}"


def test_only_commands_and_configuration_know_omegaconf():
    rooms = {"config", "commands", "explain", "composition", "completion", "cli", "plugins"}
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room not in rooms:
            text = path.read_text()
            assert "omegaconf" not in text and "import hydra" not in text, path


def test_no_pickle_and_no_code_from_configuration():
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "configs").rglob("*.yaml")]:
        if path.name == "cli.py" or "plugins" in path.parts:  # Hydra's own launchers need theirs.
            continue
        text = path.read_text()
        if path.parent.name == "interchange":  # dictionary_learning's own format is a state dict.
            for call in re.findall(r"torch\.load\([^)]*\)", text):
                assert "weights_only=True" in call, f"{call} in {path}"
            text = text.replace("torch.load(", "")
        for word in ("import pickle", "torch.load(", "_target_", "trust_remote_code=True"):
            assert not re.search(rf"(?<!\w){re.escape(word)}", text), f"{word} in {path}"
