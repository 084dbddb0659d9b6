"""From a composed config to activations: the half of a run that knows no SAE.

dataset, shapes of the model's sites (no weights) → selection → store
"""

import functools
import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_runner import files
from sae_runner.commands import names
from sae_runner.commands.options import (
    GROUPS,
    KEYS,
    TRAIN_GROUPS,
    Loading,
    RootOptions,
    StoreOptions,
)
from sae_runner.config import (
    construct,
    convert,
    fingerprint,
    identity,
    plain,
    resolve_device,
)
from sae_runner.data import build_dataset
from sae_runner.data.base import Dataset
from sae_runner.errors import ConfigError, did_you_mean
from sae_runner.log import working
from sae_runner.models import build_model
from sae_runner.models.base import Model, SiteInfo
from sae_runner.site import TokenSelection, layout_key, resolve_sites
from sae_runner.store.manifest import STORE_SCHEMA, read_json, selection_dir, sites_of
from sae_runner.store.pair import PairedStore
from sae_runner.store.reader import Activations, ActivationStore
from sae_runner.store.window import WindowPlan

if TYPE_CHECKING:
    from sae_runner.store.stream import StreamStore

log = logging.getLogger("sae_runner")
READS = {"image": {"image"}, "text": {"text", "tokens"}, "rows": {"rows"}}
"""What models of a modality take of a dataset."""


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


class StorePipeline:
    """Dataset, model, sites and store of a config; building one writes nothing."""

    def __init__(self, cfg: Mapping[str, Any], choices: Mapping[str, str]) -> None:
        self.cfg, self.choices = plain(cfg), dict(choices)
        if unknown := sorted(self.cfg.keys() - KEYS):
            known = KEYS & self.cfg.keys()
            raise ConfigError(f"no key {unknown[0]!r}.{did_you_mean(unknown[0], known)}")
        for group in (*GROUPS, *(TRAIN_GROUPS if "sae" in self.choices else ())):
            if not isinstance(value := self.cfg.get(group), Mapping):
                given = "null" if value is None else value
                raise ConfigError(f"{group}={given}: needs its options")
        root = {k: self.cfg[k] for k in RootOptions._fields if k in self.cfg}
        self.root: RootOptions = construct(RootOptions.from_config, root, where="")
        self.outputs = Path(self.root.outputs).expanduser()
        self.store_options = construct(StoreOptions.from_config, self.cfg["store"], where="store")
        self.loading = Loading.from_config(self.cfg["model"], self.cfg["dataset"])
        site = dict(self.cfg["site"])
        self.wanted_sites = convert(site.pop("name"), str | list[str], "site.name")
        self.wanted_target = convert(site.pop("target", None), str | None, "site.target")
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
    def source(self) -> dict[str, str]:
        """Content hashes of what a store is made from, where they cost no loading of a model."""
        found = {"data": self.raw_dataset.fingerprint()}
        weights = self.cfg["model"].get("weights")
        path = Path(str(weights)).expanduser()
        if weights and path.exists():
            parts = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
            found["model weights"] = fingerprint([files.sha256(part) for part in parts])
        return found

    @cached_property
    def shapes(self) -> Model:
        """The model without its weights.

        Raises:
            ConfigError: it reads something else than the dataset holds.
        """
        model = _shapes(self._json("model"), self._json("dataset"), str(self.outputs))
        if self.raw_dataset.modality not in READS[model.modality]:
            raise ConfigError(
                f"model={self.choices['model']}: reads {model.modality}, and "
                f"dataset={self.choices['dataset']} holds {self.raw_dataset.modality}; use another "
                "dataset"
            )
        return model

    @cached_property
    def model(self) -> Model:
        """The model with its weights, on the chosen device."""
        import torch

        with working(f"loading model {self.choices['model']}"):
            model = build_model(
                self.cfg["model"],
                device=torch.device(resolve_device(self.root.device)),
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
        """Every site of the model: from the store if that has what is wanted, else its shapes.

        A store of earlier days does not know the sites that a host has learned of since.
        """
        if (self.store_dir / "store.json").is_file() and not self.root.force:
            known = sites_of(read_json(self.store_dir / "store.json", STORE_SCHEMA, "store"))
            with suppress(ConfigError):
                for wanted in filter(None, [self.wanted_sites, self.wanted_target]):
                    resolve_sites(wanted, known)
                return known
        return self.shapes.sites()

    @cached_property
    def inputs(self) -> list[SiteInfo]:
        """The sites that `site.name` means.

        Raises:
            ConfigError: the model lacks one, or it cannot serve the token selection.
        """
        infos = resolve_sites(self.wanted_sites, self.sites)
        for info in infos:
            self.selection.check(info, self.context)
        return infos

    @cached_property
    def target(self) -> SiteInfo | None:
        """The site that a transcoder predicts.

        Raises:
            ConfigError: the model lacks it, or it has other tokens than the site that is read.
        """
        if self.wanted_target is None:
            return None
        try:
            (info,) = resolve_sites(self.wanted_target, self.sites)
        except ConfigError as error:
            raise ConfigError(str(error).replace("site.name", "site.target")) from None
        except ValueError:
            raise ConfigError(f"site.target={self.wanted_target}: means several sites") from None
        self.selection.check(info, self.context)
        if self.layout(info) != self.layout(self.site):
            raise ConfigError(
                f"site.target={info.name}: its tokens are not those of site.name={self.site.name}"
            )
        return info

    @cached_property
    def infos(self) -> list[SiteInfo]:
        """The sites that are cached: those that are read, and what a transcoder predicts."""
        return [*self.inputs, *([] if self.target is None else [self.target])]

    @property
    def site(self) -> SiteInfo:
        """The one site that an SAE is trained on."""
        if len(self.inputs) != 1:
            names = ",".join(info.name for info in self.inputs[:3])
            names += ",…" if len(self.inputs) > 3 else ""
            raise ConfigError(
                f"site.name means {len(self.inputs)} sites and an SAE takes one; "
                f"sweep over them with -m site.name={names}"
            )
        return self.inputs[0]

    @property
    def context(self) -> int | None:
        """Tokens that a text has at most."""
        context = self.cfg["model"].get("context")
        return int(context) if context else None

    def rows_per_example(self, info: SiteInfo) -> int:
        """The most rows one example gives at a site."""
        return self.selection.rows_per_example(info, self.context)

    def layout(self, info: SiteInfo) -> tuple[int, str]:
        """What sites must have in common to share rows, their order and one pass."""
        return self.rows_per_example(info), str(layout_key(info))

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
            folder, reading = self.selection_dir(info), options.reading()
            if self.target is not None:
                return PairedStore(folder, self.selection_dir(self.target), **reading)
            return ActivationStore(folder, **reading)
        return self.stream_of(self.dataset, max_bad=self.loading.max_bad)

    def stream_of(
        self, dataset: Dataset, *, max_bad: float, norm_limit: float | None = None
    ) -> "StreamStore":
        """Activations of the one site, or of a pair, as the model computes them of a dataset."""
        from sae_runner.store.stream import StreamStore

        options, info = self.store_options, self.site
        return StreamStore(
            lambda: self.model, dataset, info, self.selection, self.plan(info, dataset),
            target=self.target, norm_limit=norm_limit, mix_rows=options.mix_rows,
            keep_bytes=options.keep_bytes, dtype=options.dtype, max_bad=max_bad,
            batch_size=self.loading.batch_size, workers=self.loading.workers,
        )  # fmt: skip
