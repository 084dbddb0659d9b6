"""A language model from a local folder, asked in this process."""

import threading
from pathlib import Path
from typing import Any

import torch

from sae_runner import files
from sae_runner.errors import ConfigError
from sae_runner.evaluators._explainers._endpoint import Speaker, Unanswered
from sae_runner.models._pretrained import quiet

LARGEST_HASHED = 2**20
"""Bytes; of larger files the size has to do."""


class Local(Speaker):
    """A causal transformer that answers greedily, one question at a time.

    Args:
        folder: a Hugging Face folder with weights as safetensors and a tokenizer.
        device: where it runs.

    Raises:
        ConfigError: it cannot be loaded.
    """

    def __init__(self, folder: str, device: str | torch.device) -> None:
        super().__init__()
        self._lock = threading.Lock()
        path = folder_of(folder)
        try:
            with quiet():
                from transformers import AutoModelForCausalLM, AutoTokenizer

                self.tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
                network: Any = AutoModelForCausalLM.from_pretrained(
                    path, local_files_only=True, use_safetensors=True
                )
        except (OSError, ValueError, KeyError) as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"backend.local={folder}: {why}") from None
        self.network, self.device = network.to(device).eval(), device

    @torch.no_grad()
    def complete(self, prompt: str, max_tokens: int) -> str:
        """See `Speaker.complete`; by the model's chat template where it has one."""
        with self._lock:
            if self.ended.is_set():
                raise Unanswered("stopped")
            text = prompt
            if self.tokenizer.chat_template:
                text = self.tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}], tokenize=False,
                    add_generation_prompt=True,
                )  # fmt: skip
            ids = self.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
            longest = getattr(self.network.config, "max_position_embeddings", None)
            if longest is not None and ids.shape[1] + max_tokens > longest:
                raise Unanswered(f"a question of {ids.shape[1]} tokens is too long for the model")
            with quiet():
                found = self.network.generate(
                    ids.to(self.device), attention_mask=torch.ones_like(ids).to(self.device),
                    max_new_tokens=max_tokens, do_sample=False,
                    pad_token_id=self.tokenizer.eos_token_id,
                )  # fmt: skip
            answer = self.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
            return str(answer)


def folder_of(folder: str) -> Path:
    """The folder, which must look like a model's.

    Raises:
        ConfigError: it does not.
    """
    path = Path(folder).expanduser()
    if not (path / "config.json").is_file():
        what = "this folder has no config.json" if path.is_dir() else "no such folder"
        raise ConfigError(f"backend.local={folder}: {what}")
    return path


def identity_of(folder: str) -> str:
    """What tells one model's folder from another, without reading all of its weights."""
    facts = []
    for path in sorted(p for p in folder_of(folder).iterdir() if p.is_file()):
        size = path.stat().st_size
        facts.append(f"{path.name} {size if size > LARGEST_HASHED else files.sha256(path)}")
    return "\n".join(facts)
