"""One store, run, model or packed text below `outputs/`, read from disk without torch.

Who needs whom is in what each thing says of itself: a store names its model by name and hash and
its data by hash, a run names its store and, in its checkpoints, the model.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_runner import files
from sae_runner.commands import names

RUN = ("config.yaml", "checkpoints", "run.log")
"""A folder with any of these is a run."""
NO_RUNS = ("store", "selection", "model", "data", "report", "export", "sweeps", "leftover")
LEFT_OVER = re.compile(r"\.(?P<name>.+)\.\d+\.(partial|old)")
"""What a killed process leaves of an atomic write."""


@dataclass(frozen=True)
class Entry:
    """One thing that `ls` shows and `rm` removes."""

    kind: str
    """One of NO_RUNS, or the kind of a run (`train`)."""
    path: Path
    state: str
    """`complete`, or what it lacks."""
    holds: str
    """What is in it, in a few words."""
    n_bytes: int
    modified: float
    """When its newest file was written, seconds since the epoch."""
    called: frozenset[str]
    """Everything that others may call it."""
    mentions: frozenset[str]
    """Everything that it calls others."""
    lock: Path
    """What a process that writes it has locked."""

    @property
    def name(self) -> str:
        """The folder's name; a selection's begins with its store's."""
        own = self.path.name
        return f"{self.path.parent.name}/{own}" if self.kind == "selection" else own

    @property
    def is_run(self) -> bool:
        """Whether this is a run of any kind."""
        return self.kind not in NO_RUNS


def folders(path: Path) -> list[Path]:
    """Folders in a folder, hidden ones left out; none where it is absent."""
    if not path.is_dir():
        return []
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def is_left_over(path: Path) -> bool:
    """Whether an atomic write has, or had, this path for a while."""
    return LEFT_OVER.fullmatch(path.name) is not None


def make_entry(
    kind: str, path: Path, state: str, holds: str, called: Sequence[str], mentions: Any
) -> Entry:
    """Completed with what the file system says; `mentions` may be nested."""
    lock = path.parent if kind == "selection" else path
    if files.is_locked(lock) and (kind != "selection" or state != "complete"):
        state = f"in use, {state}"
    n_bytes, modified = _measure(path)
    own = frozenset({*called, str(path.resolve())} - {""})
    mentions = frozenset(_strings(mentions)) - own
    return Entry(kind, path, state, holds, n_bytes, modified, own, mentions, lock)


def _measure(path: Path) -> tuple[int, float]:
    """Bytes of all files, and when the newest was written; what goes meanwhile counts nothing."""
    n_bytes, newest = 0, 0.0
    for folder, _, found in os.walk(path):
        for file in (Path(folder), *(Path(folder, name) for name in found)):
            with contextlib.suppress(OSError):
                status = file.lstat()
                n_bytes += status.st_size if file != Path(folder) else 0
                newest = max(newest, status.st_mtime)
    return n_bytes, newest


def _strings(value: Any) -> Iterator[str]:
    """All strings in nested dicts and lists; of paths, also where they lead and what is above."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple | set):
        for inner in value:
            yield from _strings(inner)
    elif isinstance(value, str) and value:
        yield value
        if "/" in value:
            path = Path(value).expanduser()
            yield from (str(p) for p in [path.resolve(), *path.resolve().parents])
            yield "/".join(path.parts[-2:])


def _json(path: Path) -> dict[str, Any] | None:
    """A JSON object; {} where there is no file, None where it is damaged."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def read_store(folder: Path) -> Entry:
    """A store, which needs the model and the data that it was written from."""
    store = _json(folder / "store.json")
    state = "damaged" if store is None else "complete" if store else "unfinished: no store.json"
    every = folders(folder)
    complete = [path for path in every if _is_written(path)]
    if state == "complete" and len(complete) < len(every):
        state = f"{len(every) - len(complete)} of {len(every)} selections unfinished"
    model, dataset = ((store or {}).get(key) or {} for key in ("model", "dataset"))
    holds = f"{len(every)} selection{'s' * (len(every) != 1)}"
    if store:
        holds += f" of {model.get('name')} on {dataset.get('name')}"
    mentions = [model, dataset.get("fingerprint"), ((store or {}).get("config") or {}).get("model")]
    return make_entry("store", folder, state, holds, [folder.name], mentions)


def _is_written(folder: Path) -> bool:
    """Whether a selection has its manifest, and no records of single windows any more."""
    return (folder / "manifest.json").is_file() and not (folder / ".windows").exists()


def read_selection(folder: Path) -> Entry:
    """The rows of one site of a store."""
    manifest = _json(folder / "manifest.json")
    called = [f"{folder.parent.name}/{folder.name}"]
    if not manifest or not _is_written(folder):
        n = len(list(folder.glob("*-*.safetensors")))
        state = "damaged" if manifest is None else f"unfinished: {n} windows written"
        return make_entry("selection", folder, state, "", called, [])
    try:
        rows = [f"{manifest['splits'][s]['n_rows']:,}" for s in ("train", "heldout")]
        holds = f"{' + '.join(rows)} rows of {manifest['d']} {manifest['dtype']}"
        shards = [s for part in manifest["splits"].values() for s in part["shards"]]
        lost = sum(not (folder / shard["file"]).is_file() for shard in shards)
    except (KeyError, TypeError):
        return make_entry("selection", folder, "damaged", "", called, [])
    state = f"damaged: {lost} of {len(shards)} shards are gone" if lost else "complete"
    return make_entry("selection", folder, state, holds, called, [])


def read_run(folder: Path, kind: str, outputs: Path) -> Entry:
    """A run, which needs its store, the model behind it, and a run that it started from."""
    config = read_config(folder / "config.yaml")
    if config is None:
        state = "damaged" if (folder / "config.yaml").exists() else "unfinished"
        return make_entry(kind, folder, f"{state}: config.yaml", "", [], [])
    steps = sorted((folder / "checkpoints").glob("step_*"), key=lambda path: path.name)
    facts = _json(steps[-1] / "cfg.json") if steps else {}
    state = run_state(folder, config, steps, facts)
    holds = [str((config.get("sae") or {}).get("type", "")), headline(folder)]
    mentions: list[Any] = [config.get("init_from"), (config.get("model") or {}).get("weights")]
    if facts:
        holds[0] += f" {facts.get('d_in')} → {(facts.get('sae') or {}).get('d_sae')}"
        dataset = facts.get("dataset") or {}
        mentions += [facts.get("store"), facts.get("model"), dataset.get("fingerprint")]
    else:
        mentions += store_of(config, outputs)
    # Others call a run by its path alone: its name may be any word (run_name=…).
    return make_entry(kind, folder, state, ", ".join(filter(None, holds)), [], mentions)


def read_config(path: Path) -> dict[str, Any] | None:
    """A run's config.yaml; None if it is damaged."""
    import yaml

    # The same as OmegaConf's reading of what it wrote itself, and four times as fast.
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        config = yaml.load(path.read_text(), loader)
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return config if isinstance(config, dict) else None


def run_state(
    folder: Path, config: Mapping[str, Any], steps: Sequence[Path], facts: dict[str, Any] | None
) -> str:
    """How far a run got."""
    if facts is None or (steps and not facts):
        return f"damaged: {steps[-1].name}"
    if not steps:
        return "unfinished: no checkpoint"
    trainer = config.get("trainer")
    if trainer is None:  # An SAE of another library, which was not trained here.
        trainer = {"n_tokens": 0, "batch_size": 1}
    try:
        n_steps = int(trainer["n_tokens"]) // int(trainer["batch_size"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return "damaged: config.yaml"
    if int(facts["step"]) < n_steps:
        return f"unfinished: step {facts['step']:,} of {n_steps:,}"
    return "complete" if (folder / "report.json").is_file() else "unfinished: no report"


def headline(folder: Path) -> str:
    """L0 and FVU on held-out rows, where they were measured."""
    report = _json(folder / "report.json") or {}
    parts = []
    for key in ("l0", "fvu"):
        for envelope in (report.get("evaluators") or {}).values():
            values = [m.get(key) for m in (envelope.get("metrics") or {}).values()]
            numbers = [v for v in values if isinstance(v, int | float)]
            if numbers:
                parts.append(f"{'L0' if key == 'l0' else 'FVU'} {numbers[0]:.4g}")
                break
    return ", ".join(parts)


def store_of(config: Mapping[str, Any], outputs: Path) -> list[str]:
    """The store of a run that has no checkpoint yet, and its selections of the run's site."""
    recorded = config.get("identity") or {}
    try:
        if recorded["store"]["type"] == "stream":
            return []
        identity = names.store_identity(recorded, recorded["store"])
        store = names.store_name(config["choices"], identity)
        site = str((config.get("site") or {}).get("name"))
    except (KeyError, TypeError):
        return []
    start = re.sub(r"[^A-Za-z0-9._-]", "_", site) + "-"
    selections = [p.name for p in folders(outputs / "stores" / store) if p.name.startswith(start)]
    return [store, *(f"{store}/{name}" for name in selections)]


def read_model(folder: Path) -> Entry:
    """Weights that were trained here: called by the folder's name and by their hash."""
    facts: dict[str, Any] = {}
    for name in ("model.json", "facts.json", "training.json", "manifest.json"):
        facts = facts or _json(folder / name) or {}
    weights = list(folder.glob("*.safetensors"))
    state = "complete" if weights else f"unfinished: {_training(folder / 'training')}"
    accuracy = (facts.get("zero_shot") or {}).get("accuracy")
    holds = [str(facts.get("type") or folder.name.rsplit("-", 1)[0])]
    if isinstance(accuracy, float):
        holds.append(f"zero-shot accuracy {accuracy:.3f}")
    if isinstance(loss := facts.get("heldout_loss"), float):
        holds.append(f"held-out loss {loss:.3f}")
    called = [folder.name, str(facts.get("sha256") or "")]
    trained_on = [facts.get(key) for key in ("data", "dataset", "identity")]
    return make_entry("model", folder, state, ", ".join(holds), called, trained_on)


def _training(kept: Path) -> str:
    """How far the training of a model got before it was stopped."""
    try:
        facts = json.loads((kept / "state.json").read_bytes())
        return f"step {len(facts['losses']):,} of {facts['n_steps']:,}"
    except (OSError, ValueError, KeyError, TypeError):
        return "no weights"


def read_data(folder: Path) -> Entry:
    """Packed text: called by the hash of its tokens."""
    manifest = _json(folder / "manifest.json")
    if not manifest:
        state = "damaged" if manifest is None else "unfinished: no manifest.json"
        return make_entry("data", folder, state, "", [folder.name], [])
    rows = manifest.get("n_rows") or {}
    context = (manifest.get("framing") or {}).get("context")
    holds = " + ".join(f"{n:,}" for n in rows.values()) + f" rows of {context} tokens"
    called = [folder.name, str(manifest.get("sha256") or "")]
    return make_entry("data", folder, "complete", holds, called, [])


def left_over(path: Path) -> Entry:
    """What an atomic write has written so far, or had when it was killed."""
    match = LEFT_OVER.fullmatch(path.name)
    assert match
    lock = path.parent / match["name"]
    state = "being written" if files.is_locked(lock) else "left by a process that was killed"
    called = frozenset({str(path.resolve())})
    return Entry("leftover", path, state, "", *_measure(path), called, frozenset(), lock)
