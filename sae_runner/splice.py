"""A model run as it is, and with something else in the place of one site: one way for all.

End-to-end training and evaluation judge a reconstruction by what the model makes of it; both run
it through here.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_runner.errors import ConfigError
from sae_runner.models.base import Edit, Inputs, Model, SiteInfo
from sae_runner.site import resolve_sites


class Run(NamedTuple):
    """What one pass of a model gave."""

    output: Tensor
    sites: dict[str, Float[Tensor, "n t d"]]
    """The site that is spliced and what was watched, by name."""


def run(
    model: Model,
    inputs: Inputs,
    site: SiteInfo,
    x: Float[Tensor, "n t d"] | None = None,
    *,
    watched: Sequence[SiteInfo] = (),
) -> Run:
    """Run the model, or what comes after `site` when that holds `x`: output and watched sites.

    The site itself is among what is seen. The model stays in its own precision under autocast.
    """
    seen: dict[str, Tensor] = {}

    def look(name: str) -> Edit:
        def edit(x: Tensor) -> Tensor:
            seen[name] = x
            return x

        return edit

    later = {info.name: look(info.name) for info in watched}
    with torch.autocast(model.device.type, enabled=False):
        if x is not None:
            output = model.resume_from(site.name, x, inputs, later)
            return Run(output, {site.name: x, **seen})
        return Run(model.splice(inputs, {site.name: look(site.name), **later}), seen)


def rows_of(x: Tensor, valid: Bool[Tensor, "n t"] | None) -> Float[Tensor, "m d"]:
    """The last axis of `x`, of all places or of those that are valid."""
    return x.flatten(0, -2) if valid is None else x[valid.to(x.device)]


def kl_of_rows(
    clean: Float[Tensor, "n classes"], spliced: Float[Tensor, "n classes"]
) -> Float[Tensor, " n"]:
    """KL(clean ‖ spliced), in nats, of the softmax of each row of logits."""
    precision = torch.promote_types(clean.dtype, torch.float32)  # Not in half precision.
    log_p, log_q = clean.to(precision).log_softmax(1), spliced.to(precision).log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def kl_divergence(
    clean: Float[Tensor, "n classes"], spliced: Float[Tensor, "n classes"]
) -> Float[Tensor, ""]:
    """The mean over rows of `kl_of_rows`."""
    return kl_of_rows(clean, spliced).mean()


def final_norm(model: Model, site: SiteInfo) -> SiteInfo | None:
    """What the model's last norm gives; None where there is none after `site`."""
    names = list(model.sites())
    later = names[names.index(site.name) + 1 :]
    return model.sites()["final_norm"] if "final_norm" in later else None


def later_sites(
    model: Model, site: SiteInfo, wanted: Sequence[str] | None, key: str, otherwise: str = ""
) -> list[SiteInfo]:
    """The sites after `site` that `wanted` means; by default `resid_post` of every later block.

    Args:
        model: with weights or without.
        site: where something is spliced in.
        wanted: names, host names or globs; None for the default.
        key: the option that holds `wanted`, for the messages.
        otherwise: what else could be done where no block is left, for the message.

    Raises:
        ConfigError: there are none, or one that is named does not come later.
    """
    sites = list(model.sites().values())
    names = [info.name for info in sites]
    later = sites[names.index(site.name) + 1 :]
    if wanted is None:
        found = [x for x in later if x.name.endswith(".resid_post")]
        if not site.name.endswith(".resid_pre"):  # Of its own block only what it is added to.
            block = ".".join(site.name.split(".")[:2])
            found = [x for x in found if not x.name.startswith(f"{block}.")]
        if not found:
            raise ConfigError(
                f"{key}=null: no block comes after {site.name}; name later sites{otherwise}"
            )
        return found
    try:
        chosen = resolve_sites(wanted, model.sites())
    except ConfigError as error:
        raise ConfigError(str(error).replace("site.name", key, 1)) from None
    for info in chosen:
        if info not in later:
            raise ConfigError(f"{key}={info.name}: does not come after {site.name}")
    return chosen
