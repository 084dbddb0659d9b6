"""Text as a language model reads it: token ids, framed, padded and marked."""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_runner.data._packed import Framing
from sae_runner.data.base import Example
from sae_runner.errors import ConfigError, DataError
from sae_runner.models.base import Inputs, labels_of


class Tokens:
    """A Hugging Face tokenizer and how its tokens are framed for one model.

    Args:
        tokenizer: a `PreTrainedTokenizer`.
        context: most tokens of an example, special ones included; longer text loses its end.
        prepend_bos: whether every example begins with BOS (never with an encoder: it has CLS).
        encoder: whether text is framed as `[CLS] … [SEP]`.

    Raises:
        ConfigError: the tokenizer has no BOS to prepend, or the model is no decoder.
    """

    def __init__(self, tokenizer: Any, *, context: int, prepend_bos: bool, encoder: bool) -> None:
        self.tokenizer, self.context = tokenizer, context
        self.known: dict[int, str] = {}
        separator = tokenizer.sep_token_id if encoder else tokenizer.eos_token_id
        prefix: tuple[int, ...] = ()
        suffix: tuple[int, ...] = ()
        if encoder:
            if prepend_bos:
                raise ConfigError("model.prepend_bos=true: an encoder begins with [CLS]; use false")
            prefix, suffix = (tokenizer.cls_token_id,), (tokenizer.sep_token_id,)
        elif prepend_bos:
            if tokenizer.bos_token_id is None:
                raise ConfigError("model.prepend_bos=true: this tokenizer has no BOS; use false")
            prefix = (tokenizer.bos_token_id,)
        self.framing = Framing(context, prefix, suffix, separator)
        special = sorted(set(tokenizer.all_special_ids))
        self.special = torch.tensor(special, dtype=torch.int64)
        # Padded positions are masked, so that any id serves where there is no token for it.
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without any special token and of any length."""
        found = self.tokenizer(
            texts, add_special_tokens=False, padding=False, truncation=False,
            return_attention_mask=False, return_token_type_ids=False, verbose=False,
        )  # fmt: skip
        ids: list[list[int]] = found["input_ids"]
        return ids

    def begun(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text with what a text begins with, and nothing after."""
        return [[*self.framing.prefix, *row] for row in self.encode(texts)]

    def prepare(self, examples: Sequence[Example]) -> Inputs:
        """A batch of strings, or of rows that are packed already.

        Strings are padded on the right to the longest of the batch. What is padded is masked, so
        that an example's activations do not depend on its batch beyond rounding.

        Raises:
            DataError: a string without any token.
        """
        ids = torch.tensor([example.id for example in examples], dtype=torch.int64)
        labels = labels_of(examples)
        if not isinstance(examples[0].value, str):
            tokens = torch.from_numpy(np.stack([example.value for example in examples]))
            attended = torch.ones(tokens.shape, dtype=torch.bool)
            return Inputs(ids, {"tokens": tokens}, attended, self.is_special(tokens), labels)
        tokens, attended = self._padded(examples)
        tensors = {"tokens": tokens, "mask": attended.long()}
        return Inputs(ids, tensors, attended, self.is_special(tokens), labels)

    def _padded(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        prefix, suffix = self.framing.prefix, self.framing.suffix
        encoded = self.encode([example.value for example in examples])
        rows = [[*prefix, *row[: self.framing.body], *suffix] for row in encoded]
        for example, row in zip(examples, rows, strict=True):
            if not row:
                raise DataError(f"example {example.id}: text without any token")
        return self.pad_rows(rows)

    def pad_rows(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Rows of token ids padded on the right, and True where a token is no padding."""
        tokens = torch.full((len(rows), max(map(len, rows))), self.pad, dtype=torch.int64)
        attended = torch.zeros(tokens.shape, dtype=torch.bool)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row)
            attended[i, : len(row)] = True
        return tokens, attended

    def rows(self, rows: Sequence[Sequence[int]]) -> Inputs:
        """A batch of rows of token ids as they are."""
        tokens, attended = self.pad_rows(rows)
        tensors = {"tokens": tokens, "mask": attended.long()}
        return Inputs(torch.arange(len(rows)), tensors, attended, self.is_special(tokens))

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """The text of each token after another word: with the space that is before it, if one is.

        Alone, a tokenizer that marks what goes on with a word, or where one begins, drops that.
        """
        # Of many tokens that are shown few differ.
        if new := [token for token in dict.fromkeys(tokens) if token not in self.known]:
            self.known.update(zip(new, self._pieces(new), strict=True))
        return [self.known[token] for token in tokens]

    def _pieces(self, tokens: list[int]) -> list[str]:
        if (mark := self._goes_on) is not None:
            words: list[str] = self.tokenizer.convert_ids_to_tokens(tokens)
            return [w.removeprefix(mark) if w.startswith(mark) else f" {w}" for w in words]
        anchor = self.encode(["a"])[0][-1]
        before: str = self.tokenizer.decode([anchor])
        pairs: list[str] = self.tokenizer.batch_decode([[anchor, token] for token in tokens])
        return [pair.removeprefix(before) for pair in pairs]

    @cached_property
    def _goes_on(self) -> str | None:
        """What begins a token that goes on with a word (WordPiece), whatever the decoder does."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        found = getattr(backend and backend.model, "continuing_subword_prefix", None)
        is_word_piece = type(backend and backend.model).__name__ == "WordPiece"
        return found if is_word_piece and found else None

    @property
    def filler(self) -> int:
        """[MASK], or the last token of " _" where there is none."""
        if self.tokenizer.mask_token_id is not None:
            return int(self.tokenizer.mask_token_id)
        return self.encode([" _"])[0][-1]

    def is_special(self, tokens: Tensor) -> Tensor:
        """True at BOS, EOS, CLS, SEP and their like."""
        return torch.isin(tokens, self.special)

    def hash(self) -> str:
        """SHA-256 over the vocabulary, the merges and the special tokens (hex)."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            stored = json.loads(backend.to_str())
            # Set by whoever used the tokenizer last; this module truncates and pads itself.
            facts: Any = {k: v for k, v in stored.items() if k not in ("truncation", "padding")}
        else:
            facts = sorted(self.tokenizer.get_vocab().items())
        text = json.dumps([facts, self.special.tolist(), self.pad], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()
