"""SAEs and objectives of end-to-end training on the host of `host_fixtures`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from host_fixtures import SITE, D, Host

from sae_runner.config import preset
from sae_runner.saes import SAES
from sae_runner.saes.base import SAE
from sae_runner.site import TokenSelection
from sae_runner.statistics import ActivationStats
from sae_runner.training.objectives.e2e import EndToEnd


@pytest.fixture
def sae() -> Callable[..., SAE]:
    """`sae("relu", l1_coefficient=0.1)`: initialised on random rows, in float64."""

    def build(kind: str, **options: Any) -> SAE:
        cfg = preset("sae", kind)
        # As many candidates as latents: two that begin alike would be equally strong.
        small = {"d_sae": 16, "expansion": None, "k": 3, "n_candidates": 16, "units": None}
        small |= options
        cfg.update({key: value for key, value in small.items() if key in cfg})
        made: SAE = SAES.build(cfg, d_in=D)
        x = 2 * torch.randn(64, D, generator=torch.Generator().manual_seed(1)) + 0.5
        norms = x.norm(dim=1)
        stats = ActivationStats(x.mean(0), float(norms.mean()), float(norms.square().mean()), x)
        made.initialise(stats, torch.Generator().manual_seed(2))
        return made.double()

    return build


@pytest.fixture
def objective(host: Host, selection: TokenSelection) -> Callable[..., EndToEnd]:
    """`objective(sae, kl_coefficient=1.0)`: all coefficients are 0 unless they are given."""

    def build(sae: SAE, site: str = SITE, **options: Any) -> EndToEnd:
        none = {"kl_coefficient": 0.0, "downstream_coefficient": 0.0, "downstream_sites": None,
                "reconstruction_coefficient": 0.0}  # fmt: skip
        tokens = options.pop("selection", selection)
        return EndToEnd(sae, host, host.sites()[site], tokens, **(none | options))

    return build
