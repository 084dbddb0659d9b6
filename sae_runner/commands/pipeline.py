"""From a composed config to the objects of a run, each built when it is first needed.

    dataset, shapes of the model's sites (no weights) → selection → store → SAE, trainer options

This is where configs end: what is handed on takes plain typed arguments.
"""

import functools
import json
import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sae_runner.commands import names
from sae_runner.config import (
    NonNegative,
    Positive,
    PositiveFloat,
    construct,
    identity,
    plain,
    resolve_device,
)
from sae_runner.data import build_dataset
from sae_runner.data.base import Dataset
from sae_runner.errors import ConfigError
from sae_runner.evaluators import EVALUATORS
from sae_runner.evaluators.base import Evaluator
from sae_runner.files import require_writable
from sae_runner.models import build_model
from sae_runner.models.base import Model, SiteInfo
from sae_runner.report.expected import check_expected
from sae_runner.saes import SAES
from sae_runner.saes.base import SAE
from sae_runner.site import TokenSelection, resolve_sites
from sae_runner.store.manifest import STORE_SCHEMA, read_json, selection_dir, sites_of
from sae_runner.store.reader import Activations, ActivationStore
from sae_runner.store.window import WindowPlan
from sae_runner.training.trainer import TrainOptions

log = logging.getLogger("sae_runner")


class StoreOptions(NamedTuple):
    """The `store` group."""

    kind: str
    dtype: str
    seed: int
    window_rows: int
    mix_rows: int
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
    ) -> "StoreOptions":
        """Typed and in range."""
        if max_norm_multiple is not None and type == "stream":
            raise ConfigError(
                "store.max_norm_multiple: a stream has no median norm; use store=disk"
            )
        return cls(type, dtype, seed, window_rows, mix_rows, max_norm_multiple, prefetch, verify)


class EvalOptions(NamedTuple):
    """The `eval` block: which rows the shared pass sees."""

    n_rows: int | None
    batch_size: int
    seed: int

    @classmethod
    def from_config(
        cls, *, n_rows: Positive | None, batch_size: Positive, seed: NonNegative
    ) -> "EvalOptions":
        """Typed and in range."""
        return cls(n_rows, batch_size, seed)


class Loading(NamedTuple):
    """How inputs are read; no part of any fingerprint."""

    batch_size: int
    workers: int
    max_bad: float

    @classmethod
    def from_config(
        cls, *, batch_size: Positive, workers: NonNegative, max_bad: float
    ) -> "Loading":
        """Typed and in range."""
        return cls(batch_size, workers, max_bad)


@functools.lru_cache(maxsize=32)
def _dataset(config: str, outputs: str) -> Dataset:
    return build_dataset(json.loads(config), outputs=Path(outputs))


@functools.lru_cache(maxsize=32)
def _shapes(model: str, dataset: str, outputs: str) -> Model:
    """The model without weights: its sites and what it makes of a dataset."""
    import torch

    return build_model(
        json.loads(model),
        device=torch.device("meta"),
        dataset=_dataset(dataset, outputs),
        outputs=Path(outputs),
        meta=True,
    )


class Pipeline:
    """The objects that a config describes; building one writes nothing."""

    def __init__(self, cfg: Mapping[str, Any], choices: Mapping[str, str]) -> None:
        self.cfg, self.choices = plain(cfg), dict(choices)
        self.outputs = Path(self.cfg["outputs"]).expanduser()
        self.store_options = construct(StoreOptions.from_config, self.cfg["store"], where="store")
        self.loading = construct(
            Loading.from_config,
            {
                "batch_size": self.cfg["model"].get("batch_size", 64),
                "workers": self.cfg["dataset"].get("workers", 2),
                "max_bad": self.cfg["dataset"].get("max_bad", 0.001),
            },
            where="model",
        )
        site = dict(self.cfg["site"])
        self.wanted_sites = site.pop("name")
        self.selection: TokenSelection = construct(
            TokenSelection.from_config, site, where="site", seed=self.store_options.seed
        )

    # -- Names and places ------------------------------------------------------------------------

    @cached_property
    def store_identity(self) -> dict[str, Any]:
        """What decides the bytes of a store."""
        groups = identity(self.cfg, names.STORE_GROUPS)
        return names.store_identity(groups, self.store_options._asdict())

    @property
    def store_dir(self) -> Path:
        """Where the activations are or would be."""
        return self.outputs / "stores" / names.store_name(self.choices, self.store_identity)

    @cached_property
    def run_identity(self) -> dict[str, Any]:
        """What decides a trained SAE."""
        return identity(self.cfg, names.RUN_GROUPS)

    @property
    def run_dir(self) -> Path:
        """Where the run is or would be: named by content, so re-typing a command finds it."""
        name = self.cfg.get("run_name") or names.run_name(self.choices, self.run_identity)
        return self.outputs / "train" / name

    # -- Inputs and model ------------------------------------------------------------------------

    def _json(self, group: str) -> str:
        return json.dumps(self.cfg[group], sort_keys=True)

    @cached_property
    def raw_dataset(self) -> Dataset:
        """The dataset as it is configured."""
        dataset = _dataset(self._json("dataset"), str(self.outputs))
        dataset.name = self.choices["dataset"]
        return dataset

    @cached_property
    def shapes(self) -> Model:
        """The model without its weights."""
        return _shapes(self._json("model"), self._json("dataset"), str(self.outputs))

    @cached_property
    def model(self) -> Model:
        """The model with its weights, on the chosen device."""
        import torch

        model = build_model(
            self.cfg["model"],
            device=torch.device(resolve_device(self.cfg["device"])),
            dataset=self.raw_dataset,
            outputs=self.outputs,
            meta=False,
            name=self.choices["model"],
        )
        log.info("model %s is loaded on %s", self.choices["model"], model.device)
        return model

    @cached_property
    def dataset(self) -> Dataset:
        """The dataset as the model reads it (running text is packed here)."""
        dataset = self.model.adapt(self.raw_dataset)
        dataset.name = self.choices["dataset"]
        return dataset

    # -- Sites and store -------------------------------------------------------------------------

    @cached_property
    def sites(self) -> dict[str, SiteInfo]:
        """Every site of the model: from the store if there is one, else from its shapes."""
        if (self.store_dir / "store.json").is_file():
            return sites_of(read_json(self.store_dir / "store.json", STORE_SCHEMA, "store"))
        return self.shapes.sites()

    @cached_property
    def infos(self) -> list[SiteInfo]:
        """The sites that are asked for.

        Raises:
            ConfigError: the model lacks one, or it cannot serve the token selection.
        """
        infos = resolve_sites(self.wanted_sites, self.sites)
        for info in infos:
            self.selection.check(info)
        return infos

    @property
    def site(self) -> SiteInfo:
        """The one site that an SAE is trained on."""
        if len(self.infos) != 1:
            names = ",".join(info.name for info in self.infos[:3])
            raise ConfigError(
                f"site.name means {len(self.infos)} sites and an SAE takes one; "
                f"sweep over them with -m site.name={names}"
            )
        return self.infos[0]

    @property
    def context(self) -> int | None:
        """Tokens that a text has at most."""
        context = self.cfg["model"].get("context")
        return int(context) if context else None

    def rows_per_example(self, info: SiteInfo) -> int:
        """The most rows one example gives at a site."""
        return self.selection.rows_per_example(info, self.context)

    def plan(self, info: SiteInfo, dataset: Dataset | None = None) -> WindowPlan:
        """How the examples are cut into windows."""
        return WindowPlan.make(
            dataset or self.dataset,
            window_rows=self.store_options.window_rows,
            rows_per_example=self.rows_per_example(info),
            seed=self.store_options.seed,
        )

    def selection_dir(self, info: SiteInfo) -> Path:
        """The folder of one site's rows."""
        return selection_dir(self.store_dir, info.name, self.selection)

    def open_store(self) -> Activations:
        """The activations of the one site: memory-mapped, or computed as they are read."""
        options, info = self.store_options, self.site
        if options.kind == "disk":
            return ActivationStore(
                self.selection_dir(info),
                max_norm_multiple=options.max_norm_multiple,
                mix_rows=options.mix_rows,
                verify=options.verify,
            )
        from sae_runner.store.stream import StreamStore

        return StreamStore(
            lambda: self.model, self.dataset, info, self.selection, self.plan(info),
            mix_rows=options.mix_rows, dtype=options.dtype, batch_size=self.loading.batch_size,
            workers=self.loading.workers, max_bad=self.loading.max_bad,
        )  # fmt: skip

    # -- SAE, training, evaluation ---------------------------------------------------------------

    def build_sae(self, d_in: int, *, device: str = "cpu") -> SAE:
        """An SAE with uninitialised weights."""
        import torch

        with torch.device(device):
            sae: SAE = SAES.build(self.cfg["sae"], d_in=d_in)
        return sae

    @cached_property
    def train_options(self) -> TrainOptions:
        """The `trainer` group."""
        options: TrainOptions = construct(
            TrainOptions.from_config, self.cfg["trainer"], where="trainer"
        )
        return options

    @cached_property
    def eval_options(self) -> EvalOptions:
        """The `eval` block."""
        options: EvalOptions = construct(EvalOptions.from_config, self.cfg["eval"], where="eval")
        return options

    @cached_property
    def evaluators(self) -> dict[str, Evaluator]:
        """The evaluators by their names in the report."""
        return {
            name: EVALUATORS.build(options, f"evaluators.{name}")
            for name, options in self.cfg["evaluators"].items()
        }

    def check(self, *, train: bool = True) -> None:
        """Refuse everything that can be refused before a directory is made or weights are read.

        Raises:
            InputError: the first thing that is wrong.
        """
        require_writable(self.outputs)
        resolve_device(self.cfg["device"])
        if train:
            SAES.check(self.cfg["sae"])
            _ = self.train_options, self.eval_options, self.evaluators
            check_expected(self.cfg.get("expected") or [])
        _ = self.raw_dataset, self.infos
        if train:
            self.build_sae(self.site.d, device="meta")
            for name, evaluator in self.evaluators.items():
                try:
                    evaluator.check(self.raw_dataset)
                except ConfigError as error:
                    raise ConfigError(f"evaluators.{name}: {error}") from None
