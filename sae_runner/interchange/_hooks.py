"""Canonical site names and TransformerLens' hook names, both ways."""

import re

from sae_runner.models._bridge import HOOKS

SITES = {hook: site for site, hook in HOOKS.items()}


def hook_of(site: str) -> tuple[str, int | None] | None:
    """`blocks.3.attn_z.5` as (`blocks.3.attn.hook_z`, 5); None: it is no hook."""
    if site == "embed":
        return "hook_embed", None
    match = re.fullmatch(r"blocks\.(\d+)\.([a-z_]+)(?:\.(\d+))?", site)
    if not match or match[2] not in HOOKS:
        return None
    return f"blocks.{match[1]}.{HOOKS[match[2]]}", int(match[3]) if match[3] else None


def site_of(hook: str, head: int | None = None) -> str | None:
    """The canonical name of a hook, of one head of it if `head` is given; None: it has none."""
    if hook == "hook_embed" and head is None:
        return "embed"
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
    if not match or match[2] not in SITES:
        return None
    return f"blocks.{match[1]}.{SITES[match[2]]}" + ("" if head is None else f".{head}")
