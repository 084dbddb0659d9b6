"""Every YAML composes and agrees with the signature of the class it describes."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from sae_runner.config import checked_options, config_dir, construct
from sae_runner.data import COMMON_KEYS as DATASET_KEYS
from sae_runner.data import DATASETS
from sae_runner.evaluators import EVALUATORS
from sae_runner.models import COMMON_KEYS as MODEL_KEYS
from sae_runner.models import MODELS
from sae_runner.saes import SAES
from sae_runner.training.dead_latents import DEAD_LATENTS
from sae_runner.training.objectives import OBJECTIVES
from sae_runner.training.options import TrainOptions

ROOT = Path(config_dir())
REGISTRIES = {"model": MODELS, "dataset": DATASETS, "sae": SAES}
COMMON = {"model": MODEL_KEYS, "dataset": DATASET_KEYS, "sae": {"dead_latents"}}
OPTIONS = sorted(p for p in ROOT.glob("*/*.yaml") if p.parent.name != "hydra")


def composed(*overrides: str):
    with initialize_config_dir(str(ROOT), version_base="1.3"):
        return compose("train", list(overrides))


@pytest.mark.parametrize("path", OPTIONS, ids=lambda p: f"{p.parent.name}={p.stem}")
def test_every_option_composes_and_fits_its_class(path):
    group, option = path.parent.name, path.stem
    value = f"[{option}]" if group == "evaluators" else option
    cfg = OmegaConf.to_container(composed(f"{group}={value}"), resolve=True)
    if group in REGISTRIES:
        options = {k: v for k, v in cfg[group].items() if k not in COMMON[group]}
        REGISTRIES[group].check(options)
    if group == "sae":
        DEAD_LATENTS.check(cfg["sae"]["dead_latents"])
        assert set(cfg[group]) >= COMMON[group]
    if group in ("sae", "trainer"):
        OBJECTIVES.check(cfg["trainer"]["objective"])
    if group == "evaluators":
        assert list(cfg["evaluators"]) == [option]
        EVALUATORS.check(cfg["evaluators"][option])
    if group == "experiment":
        own = {k: v for k, v in cfg["trainer"].items() if k != "objective"}
        train_options = construct(TrainOptions.from_config, own, where="trainer")
        options = {k: v for k, v in cfg["sae"].items() if k != "dead_latents"}
        with torch.device("meta"):
            sae = SAES.build(options, d_in=512, d_out=512)
            strategy = cfg["sae"]["dead_latents"]
            DEAD_LATENTS.build(strategy, sae=sae, window=train_options.dead_window)
        assert cfg["expected"] is None or isinstance(cfg["expected"], list)


@pytest.mark.parametrize(
    ("profile", "n_train", "n_test", "n_words"),
    [("smoke", 1_000, 500, 2_000), ("standard", 4_000, 1_000, None), ("full", 20_000, 5_000, None)],
)
def test_a_profile_sizes_probes_and_absorption_unless_the_command_does(
    profile, n_train, n_test, n_words
):
    words = ["evaluators=[probes,absorption]", f"eval={profile}"]
    cfg = OmegaConf.to_container(composed(*words), resolve=True)["evaluators"]
    assert (cfg["probes"]["n_train"], cfg["probes"]["n_test"]) == (n_train, n_test)
    assert cfg["absorption"]["n_words"] == n_words
    words += ["eval.n_words=90", "eval.n_probe_train=70", "evaluators.probes.n_test=80"]
    cfg = OmegaConf.to_container(composed(*words), resolve=True)["evaluators"]
    assert (cfg["probes"]["n_train"], cfg["probes"]["n_test"]) == (70, 80)
    assert cfg["absorption"]["n_words"] == 90


@pytest.mark.parametrize("registry", [SAES, EVALUATORS], ids=lambda r: r.kind)
def test_every_type_has_a_yaml_of_its_name(registry):
    group = "sae" if registry is SAES else "evaluators"
    assert set(registry.names()) <= {p.stem for p in (ROOT / group).glob("*.yaml")}


def test_every_strategy_for_dead_latents_has_a_yaml_that_fits():
    folder = ROOT / "sae" / "dead_latents"
    assert set(DEAD_LATENTS.names()) == {p.stem for p in folder.glob("*.yaml")}
    for name in DEAD_LATENTS.names():
        cfg = OmegaConf.to_container(composed(f"sae/dead_latents={name}"), resolve=True)
        DEAD_LATENTS.check(cfg["sae"]["dead_latents"])
        assert cfg["sae"]["dead_latents"]["type"] == name


@pytest.mark.parametrize("option", sorted(p.stem for p in ROOT.glob("trainer/objective/*.yaml")))
@pytest.mark.parametrize("sae", ["topk", "gated"])  # Which name different trainers.
def test_every_objective_fits_its_class_under_every_trainer(option, sae):
    words = [f"sae={sae}", f"trainer/objective={option}"]
    cfg = OmegaConf.to_container(composed(*words), resolve=True)
    OBJECTIVES.check(cfg["trainer"]["objective"])
    types = {p.stem for p in (ROOT / "trainer" / "objective").glob("*.yaml")}
    assert set(OBJECTIVES.names()) <= types


@pytest.mark.parametrize("registry", [MODELS, DATASETS], ids=lambda r: r.kind)
def test_every_type_is_used_by_a_yaml(registry):
    group = "model" if registry is MODELS else "dataset"
    used = {OmegaConf.load(p).get("type") for p in (ROOT / group).glob("*.yaml")}
    assert set(registry.names()) <= used


def test_no_constructor_has_a_default_for_an_option():
    import inspect

    for registry in (SAES, EVALUATORS, MODELS, DATASETS):
        for name in registry.names():
            for parameter in inspect.signature(registry[name]).parameters.values():
                if parameter.kind is parameter.KEYWORD_ONLY:
                    assert parameter.default is parameter.empty, f"{name}.{parameter.name}"


def test_groups_without_a_registry_fit_their_options():
    from sae_runner.commands.options import EvalOptions, StoreOptions
    from sae_runner.site import TokenSelection
    from sae_runner.training.trainer import TrainOptions

    cfg = OmegaConf.to_container(composed(), resolve=True)
    site = {k: v for k, v in cfg["site"].items() if k not in ("name", "target")}
    for target, options, where in (
        (StoreOptions.from_config, cfg["store"], "store"),
        (
            TrainOptions.from_config,
            {k: v for k, v in cfg["trainer"].items() if k != "objective"},
            "trainer",
        ),
        (EvalOptions.from_config, cfg["eval"], "eval"),
        (TokenSelection.from_config, {k: v for k, v in site.items()}, "site"),
    ):
        checked_options(target, options, where=where)
