"""From a composed config to the objects of a run, each built when it is first needed.

    dataset, shapes of the model's sites (no weights) → selection → store → SAE, trainer options

This is where configs end: what is handed on takes plain typed arguments.
"""

import functools
import inspect
import json
import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from sae_runner import files
from sae_runner.checkpoint import find_checkpoint, read_facts
from sae_runner.commands import names, objectives
from sae_runner.commands.options import (
    GROUPS,
    KEYS,
    TRAIN_GROUPS,
    EvalOptions,
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
from sae_runner.errors import ConfigError, StoreError, did_you_mean
from sae_runner.evaluators import EVALUATORS
from sae_runner.evaluators.base import Evaluator
from sae_runner.files import require_writable
from sae_runner.models import build_model
from sae_runner.models.base import Model, SiteInfo
from sae_runner.report.expected import check_expected
from sae_runner.saes import SAES
from sae_runner.saes.base import SAE
from sae_runner.site import TokenSelection, layout_key, resolve_sites
from sae_runner.store.manifest import STORE_SCHEMA, read_json, selection_dir, sites_of
from sae_runner.store.pair import PairedStore
from sae_runner.store.reader import Activations, ActivationStore
from sae_runner.store.window import WindowPlan
from sae_runner.training.dead_latents import DEAD_LATENTS
from sae_runner.training.dead_latents.base import DeadLatents
from sae_runner.training.trainer import TrainOptions

log = logging.getLogger("sae_runner")


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

    @cached_property
    def run_identity(self) -> dict[str, Any]:
        """What decides a trained SAE."""
        found = identity(self.cfg, names.RUN_GROUPS)
        # A glob, a host's own name and a selection's unused options mean one site and its tokens.
        found["site"] = {"name": self.site.name, "tokens": self.selection.slug}
        if self.target is not None:
            found["site"]["target"] = self.target.name
        if self.root.init_from:  # A start is what its weights are, not where they lie.
            found["init_from"] = start_hash(self.root.init_from)
        return found

    @property
    def run_dir(self) -> Path:
        """Where the run is or would be: named by content, so re-typing a command finds it."""
        name = self.root.run_name or names.run_name(self.choices, self.run_identity)
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
        """The model without its weights."""
        return _shapes(self._json("model"), self._json("dataset"), str(self.outputs))

    @cached_property
    def model(self) -> Model:
        """The model with its weights, on the chosen device."""
        import torch

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
        """Every site of the model: from the store if there is one, else from its shapes."""
        if (self.store_dir / "store.json").is_file() and not self.root.force:
            return sites_of(read_json(self.store_dir / "store.json", STORE_SCHEMA, "store"))
        return self.shapes.sites()

    @cached_property
    def inputs(self) -> list[SiteInfo]:
        """The sites that `site.name` means.

        Raises:
            ConfigError: the model lacks one, or it cannot serve the token selection.
        """
        infos = resolve_sites(self.wanted_sites, self.sites)
        for info in infos:
            self.selection.check(info)
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
        self.selection.check(info)
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
            sae: SAE = SAES.build(
                self.sae_options, d_in=d_in, d_out=d_in if self.target is None else self.target.d
            )
        return sae

    @property
    def sae_options(self) -> dict[str, Any]:
        """The `sae` group without what only training knows."""
        return {k: v for k, v in self.cfg["sae"].items() if k != "dead_latents"}

    @property
    def dead_latents(self) -> dict[str, Any]:
        """The strategy for latents that do not fire.

        Raises:
            ConfigError: it is no block of options.
        """
        chosen = self.cfg["sae"].get("dead_latents")
        if not isinstance(chosen, Mapping):
            names = DEAD_LATENTS.names()
            hint = did_you_mean(str(chosen), names)
            raise ConfigError(
                f"sae.dead_latents={chosen}: choose with sae/dead_latents=NAME.{hint}"
            )
        return dict(chosen)

    @cached_property
    def train_options(self) -> TrainOptions:
        """The `trainer` group; where steps take inputs, its batches are of whole examples."""
        own = {k: v for k, v in self.cfg["trainer"].items() if k != "objective"}
        options: TrainOptions = construct(TrainOptions.from_config, own, where="trainer")
        if objectives.runs_the_model(self):
            return objectives.whole_examples(options, self.rows_per_example(self.site))
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
        resolve_device(self.root.device)
        if train:
            SAES.check(self.sae_options)
            DEAD_LATENTS.check(self.dead_latents)
            _ = self.train_options, self.eval_options, self.evaluators
            check_expected(convert(self.cfg.get("expected"), list[Any] | None, "expected") or [])
        _ = self.raw_dataset, self.infos
        if train:
            self._check_target()
            sae = self.build_sae(self.site.d, device="meta")
            self.build_dead_latents(sae)
            objectives.check(self, sae)
            for name, evaluator in self.evaluators.items():
                try:
                    evaluator.check(self.raw_dataset)
                except ConfigError as error:
                    raise ConfigError(f"evaluators.{name}: {error}") from None

    def build_dead_latents(self, sae: SAE) -> DeadLatents:
        """The strategy for latents of `sae` that do not fire."""
        window = self.train_options.dead_window
        strategy: DeadLatents = DEAD_LATENTS.build(self.dead_latents, sae=sae, window=window)
        return strategy

    def _check_target(self) -> None:
        """A transcoder needs a pair of sites, and nothing else takes one.

        Raises:
            ConfigError: one is given where none is taken, or the other way round.
        """
        kind = str(self.cfg["sae"]["type"])
        takes = "d_out" in inspect.signature(SAES[kind]).parameters
        if takes and self.target is None:
            raise ConfigError(f"site.target=null: sae={kind} needs the site that it predicts")
        if self.target is not None and not takes:
            raise ConfigError(
                f"site.target={self.target.name}: sae={kind} reconstructs what it reads; use "
                "sae=transcoder, or null"
            )
        if self.target is not None and self.store_options.kind != "disk":
            raise ConfigError(f"store={self.store_options.kind}: a pair of sites needs store=disk")


def start_hash(source: str) -> str:
    """SHA-256 of the weights that `init_from` means.

    Raises:
        StoreError: there is no sound checkpoint.
    """
    try:
        facts = read_facts(find_checkpoint(source))
    except StoreError as error:
        raise StoreError(
            str(error).replace(f"checkpoint={source}", f"init_from={source}")
        ) from None
    return str(facts["sha256"]["sae.safetensors"])
