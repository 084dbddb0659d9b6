import pytest

from sae_runner.interchange._hooks import SITES, hook_of, site_of
from sae_runner.models._bridge import HOOKS


@pytest.mark.parametrize(
    ("site", "hook", "head"),
    [
        ("blocks.3.resid_post", "blocks.3.hook_resid_post", None),
        ("blocks.11.resid_pre", "blocks.11.hook_resid_pre", None),
        ("blocks.0.mlp_act", "blocks.0.mlp.hook_post", None),
        ("blocks.2.attn_z", "blocks.2.attn.hook_z", None),
        ("blocks.2.attn_z.5", "blocks.2.attn.hook_z", 5),
        ("embed", "hook_embed", None),
    ],
)
def test_names_go_both_ways(site, hook, head):
    assert hook_of(site) == (hook, head)
    assert site_of(hook, head) == site


def test_every_site_of_a_block_has_one_hook():
    assert len(SITES) == len(HOOKS)
    for site in HOOKS:
        assert site_of(*hook_of(f"blocks.1.{site}")) == f"blocks.1.{site}"


@pytest.mark.parametrize(
    "site", ["pooled", "stages.1.blocks.2", "blocks.x.resid_post", "blocks.1.foo"]
)
def test_other_sites_have_none(site):
    assert hook_of(site) is None


@pytest.mark.parametrize("hook", ["layers.3", "blocks.3.ln1.hook_scale", "resid_post_layer_3"])
def test_other_hooks_mean_no_site(hook):
    assert site_of(hook) is None
