"""Config blocks that no registry builds, typed and in range: what stands outside the groups too."""

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from sae_runner.config import (
    Fraction,
    Name,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    convert,
)
from sae_runner.errors import ConfigError

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
GROUPS = ("model", "site", "dataset", "store")
TRAIN_GROUPS = ("sae", "trainer", "logger", "evaluators", "eval")


# All that may stand at the top of a config.
KEYS = frozenset({
    *GROUPS, *TRAIN_GROUPS, "outputs", "device", "force", "seed", "init_from", "run_name",
    "expected", "plan",
})  # fmt: skip


class RootOptions(NamedTuple):
    """What stands outside every group."""

    outputs: str
    device: str
    force: bool
    seed: int
    init_from: str | None
    run_name: str | None

    @classmethod
    def from_config(
        cls,
        *,
        outputs: Name,
        device: str,
        force: bool,
        seed: NonNegative = 0,
        init_from: str | None = None,
        run_name: str | None = None,
    ) -> "RootOptions":
        """Typed and in range; commands that train give all of them.

        Raises:
            ConfigError: a run's name that is no plain folder name.
        """
        if run_name is not None and not RUN_NAME.fullmatch(run_name):
            raise ConfigError(
                f"run_name={run_name}: at most 200 letters, digits, '.', '_' and '-', the first "
                "no '.'"
            )
        return cls(outputs, device, force, seed, init_from, run_name)


class StoreOptions(NamedTuple):
    """The `store` group."""

    kind: str
    dtype: str
    seed: int
    window_rows: int
    mix_rows: int
    keep_gb: float
    max_norm_multiple: float | None
    prefetch: int
    verify: bool

    @classmethod
    def from_config(
        cls,
        *,
        type: Literal["disk", "stream"],
        dtype: Literal["fp32", "fp16", "bf16"],
        seed: NonNegative,
        window_rows: Positive,
        mix_rows: Positive,
        max_norm_multiple: PositiveFloat | None,
        prefetch: Positive,
        verify: bool,
        keep_gb: NonNegativeFloat = 0.0,  # Runs of before it was there do not record it.
    ) -> "StoreOptions":
        """Typed and in range."""
        if max_norm_multiple is not None and type == "stream":
            raise ConfigError(
                "store.max_norm_multiple: a stream has no median norm; use store=disk"
            )
        return cls(
            type, dtype, seed, window_rows, mix_rows, keep_gb, max_norm_multiple, prefetch, verify
        )

    @property
    def keep_bytes(self) -> int:
        """`keep_gb`, counted."""
        return round(self.keep_gb * 1e9)

    def reading(self) -> dict[str, Any]:
        """How rows are read from disk: which, in which order, and whether they are checked."""
        names = ("max_norm_multiple", "mix_rows", "keep_bytes", "verify")
        return {name: getattr(self, name) for name in names}


class EvalOptions(NamedTuple):
    """The `eval` block: how much the evaluators see.

    Of `n_probe_train`, `n_probe_test` and `n_words` the YAML of evaluators makes options of theirs.
    """

    n_rows: int | None
    n_examples: int
    n_latents: int
    n_probe_train: int
    n_probe_test: int
    n_words: int | None
    batch_size: int
    keep_gb: float
    seed: int

    @classmethod
    def from_config(
        cls,
        *,
        n_rows: Positive | None,
        n_examples: Positive,
        n_latents: Positive,
        n_probe_train: Positive,
        n_probe_test: Positive,
        n_words: Positive | None,
        batch_size: Positive,
        keep_gb: PositiveFloat,
        seed: NonNegative,
    ) -> "EvalOptions":
        """Typed and in range."""
        return cls(
            n_rows, n_examples, n_latents, n_probe_train, n_probe_test, n_words, batch_size,
            keep_gb, seed,
        )  # fmt: skip

    @property
    def keep_bytes(self) -> int:
        """`keep_gb`, counted."""
        return round(self.keep_gb * 1e9)


class Loading(NamedTuple):
    """How inputs are read; no part of any fingerprint."""

    batch_size: int
    workers: int
    max_bad: float

    @classmethod
    def from_config(cls, model: Mapping[str, Any], dataset: Mapping[str, Any]) -> "Loading":
        """Typed and in range, from the keys that the two groups have in common."""
        return cls(
            convert(model["batch_size"], Positive, "model.batch_size"),
            convert(dataset["workers"], NonNegative, "dataset.workers"),
            convert(dataset["max_bad"], Fraction, "dataset.max_bad"),
        )
