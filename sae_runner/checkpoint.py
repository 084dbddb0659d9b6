"""A trained SAE on disk, and what an exact resume needs beside it.

    checkpoints/step_00000100/
        cfg.json            schema, SAE options, d_in, step, rows seen, whose activations, hashes
        sae.safetensors     weights with every affine factor folded in: takes raw activations
        state/              trainer.json, optimizer.safetensors, weights.safetensors (unfolded)

`W_enc` is [d_in, d_sae] and `W_dec` [d_sae, d_in] in sae.safetensors.
"""

import copy
import functools
import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_runner import files
from sae_runner.errors import StoreError, nearest
from sae_runner.interchange import FORMATS, _hub, recognise
from sae_runner.interchange.base import weights_hash
from sae_runner.saes import SAES
from sae_runner.saes.base import SAE

CHECKPOINT_SCHEMA = "sae-run.checkpoint/1"
log = logging.getLogger("sae_runner")


def save_checkpoint(
    folder: Path,
    sae: SAE,
    facts: dict[str, Any],
    *,
    state: dict[str, Any] | None = None,
    optimizer: dict[str, Tensor] | None = None,
    used: SAE | None = None,
    fold: bool = True,
) -> None:
    """Write a checkpoint folder atomically.

    Args:
        folder: `checkpoints/step_N`.
        sae: the SAE in training, which stays as it is.
        facts: step, rows seen and origin, kept in cfg.json.
        state: JSON that a resume needs; None leaves `state/` out.
        optimizer: tensors that a resume needs.
        used: what `sae.safetensors` holds, folded in place; None for a copy of `sae`.
        fold: False keeps the latents of an SAE that is in raw units already as they are.
    """
    with files.atomic(folder) as temporary:
        temporary.mkdir()
        used = copy.deepcopy(sae) if used is None else used
        folded = used.fold() if fold else used
        files.write_tensors(temporary / "sae.safetensors", folded.tensors())
        hashes = {"sae.safetensors": files.sha256(temporary / "sae.safetensors")}
        if state is not None:
            files.write_json(temporary / "state" / "trainer.json", state)
            files.write_tensors(temporary / "state" / "weights.safetensors", sae.tensors())
            files.write_tensors(temporary / "state" / "optimizer.safetensors", optimizer or {})
            for path in sorted((temporary / "state").iterdir()):
                hashes[f"state/{path.name}"] = files.sha256(path)
        cfg = {
            "schema": CHECKPOINT_SCHEMA,
            "sae": folded.config(),
            "d_in": sae.d_in,
            "d_out": sae.d_out,
            **facts,
        }
        hashes["cfg.json"] = _hash_of(cfg)
        files.write_json(temporary / "cfg.json", {**cfg, "sha256": hashes})


def _hash_of(cfg: dict[str, Any]) -> str:
    """SHA-256 (hex) of cfg.json without its hashes: a k that is off by one bit is found too."""
    text = json.dumps({k: v for k, v in cfg.items() if k != "sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _hash_at(path: Path) -> str:
    """SHA-256 (hex) of a file; one that has not changed since is not read again."""
    found = path.stat()
    return _hashed(path, found.st_size, found.st_mtime_ns, found.st_ino)


@functools.lru_cache(maxsize=1024)
def _hashed(path: Path, *_: int) -> str:
    return files.sha256(path)


def step_dirs(run_dir: Path) -> list[Path]:
    """Checkpoint folders of a run, the earliest first."""
    found = (run_dir / "checkpoints").glob("step_*")
    named = (p for p in found if re.fullmatch(r"step_\d+", p.name))
    return sorted(named, key=lambda p: int(p.name[5:]))


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder that a path means: itself, or the last sound one of a run directory.

    It may be another library's folder, and `hf:org/repo/path` one on the hub.

    Raises:
        StoreError: there is none.
    """
    given = path
    is_remote = str(path).startswith(_hub.PREFIX)
    path = _hub.fetch(str(path)) if is_remote else Path(path).expanduser().absolute()
    if (path / "cfg.json").is_file() or recognise(path):
        return path
    for folder in reversed(step_dirs(path)):
        try:
            read_facts(folder)
        except StoreError as error:
            log.warning("%s; the checkpoint before it is used", error)
            continue
        return folder
    if not path.exists():
        close = nearest(path.name, (p.name for p in path.parent.glob("[!.]*/")))
        hint = f"; did you mean {path.parent / close[0]}?" if close else ""
        raise StoreError(f"checkpoint={given}: there is no such folder{hint}")
    raise StoreError(f"checkpoint={given}: no sound checkpoint in it; `sae-run ls` lists the runs")


def read_facts(folder: Path) -> dict[str, Any]:
    """cfg.json of a checkpoint, after every file in it was compared with its hash.

    Of another library's folder: what such a file would say of it, with `format` and its origin.

    Raises:
        StoreError: a file is absent or damaged, or no known tool wrote it.
    """
    if known := recognise(folder):
        sae, origin = known.read(folder)
        return {"sae": sae.config(), "d_in": sae.d_in, "d_out": sae.d_out, "step": 0, "n_tokens": 0,
                "format": known.name, "origin": origin._asdict(),
                "sha256": {"sae.safetensors": weights_hash(folder, known)}}  # fmt: skip
    try:
        facts: dict[str, Any] = json.loads((folder / "cfg.json").read_text())
    except FileNotFoundError:
        raise StoreError(f"checkpoint {folder} is incomplete: it has no cfg.json") from None
    except (ValueError, OSError) as error:
        raise StoreError(f"checkpoint {folder} is damaged: cfg.json: {error}") from None
    schema = facts.get("schema") if isinstance(facts, dict) else type(facts).__name__
    if schema != CHECKPOINT_SCHEMA:
        raise StoreError(
            f"checkpoint {folder}: schema {schema!r}, expected {CHECKPOINT_SCHEMA!r}, or a folder "
            f"of {', '.join(FORMATS.names())}"
        )
    if not isinstance(facts.get("sha256"), dict):
        raise StoreError(f"checkpoint {folder} is damaged: cfg.json lacks its hashes")
    for name, expected in facts["sha256"].items():
        path = folder / name
        if not path.is_file():
            raise StoreError(f"checkpoint {folder} is damaged: {name} is absent")
        if (_hash_of(facts) if name == "cfg.json" else _hash_at(path)) != expected:
            raise StoreError(f"checkpoint {folder} is damaged: {name} differs from its hash")
    return facts


def load_sae(path: str | Path) -> SAE:
    """A trained SAE that takes raw activations, in evaluation mode on the CPU.

    Args:
        path: a run directory (its last checkpoint), a checkpoint folder, a folder of SAELens,
            dictionary_learning or sparsify, or one of these on the hub as `hf:org/repo/path`.

    Raises:
        StoreError: no sound checkpoint there.
    """
    from safetensors.torch import load_file

    folder = find_checkpoint(path)
    if known := recognise(folder):
        return known.read(folder).sae
    facts = read_facts(folder)
    sae = build_sae(facts)
    sae.load_tensors(load_file(folder / "sae.safetensors"))
    return sae.eval().requires_grad_(False)


def build_sae(facts: dict[str, Any]) -> SAE:
    """The SAE that cfg.json describes, without its weights."""
    sae: SAE = SAES.build(facts["sae"], d_in=facts["d_in"], d_out=facts.get("d_out", facts["d_in"]))
    return sae


def load_state(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """What a resume needs: trainer.json, the unfolded weights, the optimizer's tensors.

    Raises:
        StoreError: the checkpoint was kept without its training state.
    """
    from safetensors.torch import load_file

    state_dir = folder / "state"
    if not state_dir.is_dir():
        raise StoreError(f"checkpoint {folder} was kept without its training state")
    state: dict[str, Any] = json.loads((state_dir / "trainer.json").read_text())
    weights = load_file(state_dir / "weights.safetensors")
    return state, weights, load_file(state_dir / "optimizer.safetensors")
