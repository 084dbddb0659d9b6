"""Tab completion: commands, flags, paths, what lies below `outputs`, values of a sweep.

What a key or a group may be is Hydra's to know; it is asked for one value at a time.
"""

import glob
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from omegaconf import OmegaConf

from sae_runner.command_line import VALUED, flags
from sae_runner.config import PATH_KEYS, config_dir

AskHydra = Callable[[str, Sequence[str]], list[str]]
RUN_KEYS = ("checkpoint", "init_from")
FOLDER_KEYS = ("outputs", "out", "hydra.sweep.dir")


def candidates(
    line: str, commands: Collection[str], takes_paths: Collection[str], ask_hydra: AskHydra
) -> list[str]:
    """Words that could stand in place of the last one of a command line.

    Args:
        line: as far as it was typed, `sae-run` included.
        commands: all there are.
        takes_paths: those whose words without `=` are things below `outputs`.
        ask_hydra: of a command and the words after it, what Hydra would offer for the last.
    """
    _, *words = line.split(" ")
    if len(words) < 2:
        return list(commands)
    command, *before, word = words
    before = [other for other in before if other]
    if before and before[-1] in VALUED:
        return paths_like(word) if before[-1] in ("--config-dir", "-cd") else []
    if word.startswith("-"):
        return [flag for flag in flags() if flag.startswith(word)]
    key, equals, value = word.partition("=")
    if key in RUN_KEYS and equals:
        return [f"{key}={path}" for path in things_like(value, outputs_of(before), ["train"])]
    if equals and (key in FOLDER_KEYS or key.endswith(tuple(f".{k}" for k in PATH_KEYS))):
        return [f"{key}={path}" for path in paths_like(value)]
    if command in takes_paths:
        keys = OmegaConf.load(f"{config_dir()}/{command}.yaml").keys() - {"defaults", "hydra"}
        own = [f"{name}=" for name in sorted(map(str, keys)) if f"{name}=".startswith(word)]
        places = ["train"] if command == "report" else ["*"]
        return own + ([] if equals else things_like(word, outputs_of(before), places))
    options = [other for other in before if not other.startswith("-")]
    chosen, comma, last = value.rpartition(",")
    if not comma:
        return ask_hydra(command, [*options, word])
    found = (other.partition("=")[2] for other in ask_hydra(command, [*options, f"{key}={last}"]))
    return [f"{key}={chosen},{other}" for other in found if other not in chosen.split(",")]


def outputs_of(words: Sequence[str]) -> str:
    """The folder that `outputs` means, given what was typed so far."""
    return next((w.partition("=")[2] for w in words if w.startswith("outputs=")), "outputs")


def things_like(start: str, outputs: str, places: Sequence[str]) -> list[str]:
    """Folders of `outputs` that begin so, by path or by name; else any path that does."""
    folders = [path for place in places for path in sorted(glob.glob(f"{outputs}/{place}/*/"))]
    found = [path.rstrip("/") for path in folders if path.startswith(start)]
    found += [name for path in folders if start and (name := Path(path).name).startswith(start)]
    return found or paths_like(start)


def paths_like(start: str) -> list[str]:
    """Paths that begin so; folders end in a slash, so that one can go on."""
    expanded = start.replace("~", str(Path.home()), 1) if start.startswith("~/") else start
    found = sorted(glob.glob(glob.escape(expanded) + "*"))
    return [f"{path}/" if Path(path).is_dir() else path for path in found]
