"""Folders on the Hugging Face hub: `hf:org/repo/path@revision`."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from sae_runner.errors import ConfigError, StoreError
from sae_runner.interchange import FORMATS

PREFIX = "hf:"
OWN_FILES = ("cfg.json", "sae.safetensors", "state/*")


class HubPath(NamedTuple):
    """A folder of a repository."""

    repo: str
    path: str
    """"" for the repository's own folder."""
    revision: str | None


def parse(spec: str, key: str) -> HubPath:
    """`hf:org/repo`, `hf:org/repo/path`, either with `@revision`.

    Raises:
        StoreError: it is written otherwise.
    """
    match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)((?:/[\w.+=-]+)*)/?(?:@([\w./-]+))?", spec)
    if not match or ".." in spec.split("/"):
        raise StoreError(f"{key}={spec}: expected hf:org/repo/path, or hf:org/repo/path@revision")
    return HubPath(match[1], match[2].strip("/"), match[3])


def fetch(spec: str) -> Path:
    """Download the files of one SAE, or take them from the cache; gives the local folder.

    Raises:
        StoreError: there is nothing there, or the hub cannot be reached.
    """
    import huggingface_hub

    where = parse(spec, "checkpoint")
    names = {*OWN_FILES}
    for name in FORMATS.names():
        known = FORMATS[name]
        names |= {known.weights, known.config_file, *known.extras}  # type: ignore[attr-defined]
    prefix = f"{where.path}/" if where.path else ""
    try:
        found = huggingface_hub.snapshot_download(
            where.repo,
            revision=where.revision,
            allow_patterns=[f"{prefix}{name}" for name in sorted(names)],
        )
    # Errors of the hub are OSErrors; those of a name that cannot be one are ValueErrors.
    except (OSError, ValueError) as error:
        raise StoreError(f"checkpoint={spec}: {_first_line(error)}") from None
    folder = Path(found) / where.path
    if not folder.is_dir() or not any(folder.iterdir()):
        raise StoreError(f"checkpoint={spec}: there is no SAE at that path of the repository")
    return folder


def require_token(spec: str) -> str:
    """The token of the environment; nothing else is asked for one.

    Raises:
        InputError: there is none, or `push_to` is no path on the hub.
    """
    parse(spec, "push_to")
    token = os.environ.get("HF_TOKEN")
    if not token:
        raise ConfigError(
            f"push_to={spec}: set HF_TOKEN in the environment to a token that may write"
        )
    return token


def push(folder: Path, spec: str, *, private: bool, message: str) -> str:
    """Upload a folder; gives its address.

    Raises:
        StoreError: the hub refuses, or cannot be reached.
    """
    import huggingface_hub

    where, token = parse(spec, "push_to"), require_token(spec)
    try:
        huggingface_hub.create_repo(where.repo, token=token, private=private, exist_ok=True)
        address = huggingface_hub.upload_folder(
            repo_id=where.repo,
            folder_path=folder,
            path_in_repo=where.path or None,
            revision=where.revision,
            commit_message=message,
            token=token,
        )
    except (OSError, ValueError) as error:
        raise StoreError(f"push_to={spec}: {_first_line(error)}") from None
    return str(address)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
