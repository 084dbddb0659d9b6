"""From a composed config to the objects of a run, each built when it is first needed.

    dataset, model, site → store (`StorePipeline`) → SAE, trainer options, evaluators

This is where configs end: what is handed on takes plain typed arguments.
"""

import gc
import inspect
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sae_runner.checkpoint import find_checkpoint, read_facts
from sae_runner.commands import names, objectives
from sae_runner.commands.options import EvalOptions
from sae_runner.commands.store_pipeline import StorePipeline
from sae_runner.config import construct, convert, identity, options_of, resolve_device
from sae_runner.data.base import SPLITS
from sae_runner.errors import ConfigError, StoreError, did_you_mean
from sae_runner.evaluators import EVALUATORS
from sae_runner.evaluators.base import Evaluator, Setting
from sae_runner.files import require_writable
from sae_runner.log import working
from sae_runner.report.expected import check_expected
from sae_runner.saes import SAES
from sae_runner.saes.base import SAE
from sae_runner.training import recording
from sae_runner.training.dead_latents import DEAD_LATENTS
from sae_runner.training.dead_latents.base import DeadLatents
from sae_runner.training.trainer import TrainOptions


class Pipeline(StorePipeline):
    """The objects that a config describes; building one writes nothing."""

    measured: str | None = None
    """Hash of the SAE that evaluators measure, where it is known before they start."""

    # -- The run ---------------------------------------------------------------------------------

    @cached_property
    def run_identity(self) -> dict[str, Any]:
        """What decides a trained SAE."""
        sae = self.build_sae(self.site.d, device="meta").config()
        cfg = {**self.cfg, "sae": {**self.cfg["sae"], **sae}}  # However width and k were typed.
        found = identity(cfg, names.RUN_GROUPS)
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

    @working("looking at model and data")
    def check(self, *, train: bool = True) -> None:
        """Refuse everything that can be refused before a directory is made or weights are read.

        Raises:
            InputError: the first thing that is wrong.
        """
        require_writable(self.outputs)
        resolve_device(self.root.device)
        if train and "sae" not in self.cfg:
            raise ConfigError(f"sae=null: needs one of {', '.join(options_of('sae'))}")
        if train:
            SAES.check(self.sae_options)
            DEAD_LATENTS.check(self.dead_latents)
            _ = self.train_options, self.eval_options, self.evaluators
            check_expected(convert(self.cfg.get("expected"), list[Any] | None, "expected") or [])
        _ = [self.raw_dataset.ids(split) for split in SPLITS], self.infos
        if train:
            self._check_target()
            sae = self.build_sae(self.site.d, device="meta")
            self.build_dead_latents(sae)
            objectives.check(self, sae)
            recording.check(
                self.train_options, sae, torch.device(resolve_device(self.root.device)),
                runs_the_model=objectives.runs_the_model(self),
            )  # fmt: skip
            for name, evaluator in self.evaluators.items():
                try:
                    evaluator.check(self.setting)
                except ConfigError as error:
                    raise ConfigError(f"evaluators.{name}: {error}") from None

    @property
    def setting(self) -> Setting:
        """What evaluators may know before anything runs."""
        return Setting(
            self.raw_dataset, lambda: self.shapes, self.site, self.selection, self.target,
            lambda: self.build_sae(self.site.d, device="meta"), self.eval_options.keep_bytes,
            self.measured,
        )  # fmt: skip

    def release_model(self) -> None:
        """Let go of the model once rows are stored, unless steps run it too.

        Who asks for it again, such as an evaluator, loads it again.
        """
        if "model" in self.__dict__ and not objectives.runs_the_model(self):
            del self.__dict__["model"]
            gc.collect()  # Hooks and modules refer to each other.

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
