import pytest
import torch

from sae_runner.config import construct
from sae_runner.errors import ConfigError
from sae_runner.models.base import Inputs, SiteInfo
from sae_runner.site import TokenSelection, resolve_sites

TEXT = SiteInfo("blocks.0.resid_post", "h.0", 4, "tokens", None)
BERT = SiteInfo("blocks.0.resid_post", "h.0", 4, "tokens", None, n_prefix=1, has_cls=True)
IMAGE = SiteInfo(
    "blocks.0.resid_post", "b.0", 4, "tokens", 9, n_prefix=5, has_cls=True, grid=(2, 2)
)
MAP = SiteInfo("stages.0", "s.0", 4, "map", 6, grid=(2, 3))
POOLED = SiteInfo("pooled", "pool", 4, "vector", 1)


def bools(*rows: str) -> torch.Tensor:
    return torch.tensor([[c == "1" for c in row] for row in rows])


# Padding on the right, none, padding on the left, nothing but special tokens.
ATTENDED = ("111100", "111111", "001111", "110000")
SPECIAL = ("100100", "100001", "001000", "110000")


def text(**options) -> Inputs:
    return Inputs(torch.tensor([10, 11, 12, 13]), {}, bools(*ATTENDED), bools(*SPECIAL), **options)


def mask(selection: TokenSelection, inputs: Inputs, info: SiteInfo = TEXT, n: int = 6) -> list[str]:
    return ["".join("01"[v] for v in row) for row in selection.mask(info, inputs, n).tolist()]


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (TokenSelection("all"), ["011000", "011110", "000111", "000000"]),
        (TokenSelection("mean"), ["011000", "011110", "000111", "000000"]),
        (TokenSelection("all", drop_special=False), list(ATTENDED)),
        # Position 0 is an example's first token, wherever the padding is.
        (
            TokenSelection("all", drop_special=False, drop_positions=(0,)),
            ["011100", "011111", "000111", "010000"],
        ),
        (
            TokenSelection("all", drop_positions=(0, 2, 50)),
            ["010000", "010110", "000101", "000000"],
        ),
        (TokenSelection("last"), ["001000", "000010", "000001", "000000"]),
        (
            TokenSelection("last", drop_special=False),
            ["000100", "000001", "000001", "010000"],
        ),
        (
            TokenSelection("positions", positions=(1,)),
            ["010000", "010000", "000100", "010000"],
        ),
        # Negative positions count from an example's own end, not from that of the padding.
        (
            TokenSelection("positions", positions=(0, -1, 99, -99)),
            ["100100", "100001", "001001", "110000"],
        ),
    ],
    ids=lambda v: getattr(v, "slug", ""),
)  # fmt: skip
def test_masks_of_texts(selection, expected):
    assert mask(selection, text()) == expected


def test_texts_without_special_tokens_keep_all_that_is_attended():
    inputs = Inputs(torch.arange(4), {}, bools(*ATTENDED))
    assert mask(TokenSelection("all"), inputs) == list(ATTENDED)


def test_masks_of_images_ignore_what_is_for_texts():
    inputs = Inputs(torch.arange(2), {"pixels": torch.zeros(2, 3)})
    strict = {"drop_special": True, "drop_positions": (0,)}
    assert mask(TokenSelection("cls", **strict), inputs, IMAGE, 9) == ["100000000"] * 2
    assert mask(TokenSelection("patches", **strict), inputs, IMAGE, 9) == ["000001111"] * 2
    assert mask(TokenSelection("all", **strict), inputs, IMAGE, 9) == ["1" * 9] * 2
    assert mask(TokenSelection("patches", **strict), inputs, MAP, 6) == ["1" * 6] * 2
    assert (
        mask(TokenSelection("positions", positions=(0, -1)), inputs, IMAGE, 9) == ["100000001"] * 2
    )


def test_a_vector_of_a_text_is_one_row():
    assert mask(TokenSelection("all", drop_positions=(0,)), text(), POOLED, 1) == ["1"] * 4
    assert mask(TokenSelection("positions", positions=(-1,)), text(), POOLED, 1) == ["1"] * 4


def test_random_tokens_do_not_depend_on_their_company():
    n, t = 40, 12
    attended = torch.arange(t) < torch.arange(n).unsqueeze(1) % 9 + 2
    special = torch.zeros(n, t, dtype=torch.bool)
    special[:, 0] = True
    inputs = Inputs(torch.arange(n) + 7, {}, attended, special)
    selection = TokenSelection("random_k", k=3, seed=2**40)
    keep = selection.mask(TEXT, inputs, t)
    valid = attended & ~special
    assert (keep <= valid).all()
    assert keep.sum(1).tolist() == valid.sum(1).clamp(max=3).tolist()
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    parts = []
    for chosen in order.split(7):
        longest = int(attended[chosen].sum(1).max())  # Other padding, too.
        part = Inputs(inputs.ids[chosen], {}, attended[chosen, :longest], special[chosen, :longest])
        found = selection.mask(TEXT, part, longest)
        parts.append(torch.nn.functional.pad(found, (0, t - longest)))
    assert torch.equal(torch.cat(parts), keep[order])
    other = TokenSelection("random_k", k=3, seed=1).mask(TEXT, inputs, t)
    assert not torch.equal(other, keep)


def test_random_tokens_are_uniform_and_differ_between_examples():
    n, t = 6000, 6
    inputs = Inputs(torch.arange(n), {}, torch.ones(n, t, dtype=torch.bool))
    keep = TokenSelection("random_k", k=2).mask(TEXT, inputs, t).double()
    share = keep.mean(0)
    assert (share - 2 / 6).abs().max() < 4 * (2 / 6 * 4 / 6 / n) ** 0.5
    together = keep.T @ keep / n  # P(both of two tokens) = 1/15.
    pairs = together[~torch.eye(t, dtype=torch.bool)]
    assert (pairs - 1 / 15).abs().max() < 4.5 * (1 / 15 * 14 / 15 / n) ** 0.5


@pytest.mark.parametrize(
    ("selection", "info", "message"),
    [
        (TokenSelection("cls"), TEXT, r"site\.tokens=cls: blocks\.0\.resid_post has no class tok"),
        (TokenSelection("patches"), TEXT, r"site\.tokens=patches: .* has no patches; choose from"),
        (TokenSelection("positions", positions=(9,)), IMAGE, r"site\.positions=9: .* has 9 tokens"),
        (TokenSelection("positions", positions=(0, -10)), IMAGE, r"site\.positions=-10: "),
        (TokenSelection("random_k", k=10), IMAGE, r"site\.k=10: .* has 9 tokens"),
    ],
)
def test_what_a_site_cannot_serve_is_refused(selection, info, message):
    with pytest.raises(ConfigError, match=message):
        selection.check(info)


def test_what_a_site_can_serve_is_not():
    TokenSelection("cls").check(BERT)
    TokenSelection("patches").check(MAP)
    TokenSelection("positions", positions=(0, 8, -9)).check(IMAGE)
    TokenSelection("positions", positions=(700,)).check(TEXT)  # Texts decide their own length.
    TokenSelection("positions", positions=(63, -64)).check(TEXT, 64)
    TokenSelection("all", positions=(700,)).check(IMAGE)  # An option that `all` does not use.
    TokenSelection("random_k", k=9).check(IMAGE)


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (TokenSelection("positions", positions=(3, 64)), "site.positions=64: .* 64 tokens at most"),
        (TokenSelection("positions", positions=(-65,)), "site.positions=-65: .* 64 tokens at most"),
        (TokenSelection("random_k", k=65), "site.k=65: .* has 64 tokens at most"),
    ],
)
def test_a_text_has_no_more_tokens_than_its_context(selection, message):
    with pytest.raises(ConfigError, match=message):
        selection.check(TEXT, 64)


@pytest.mark.parametrize(
    ("selection", "info", "context", "n"),
    [
        (TokenSelection("all"), TEXT, 128, 128), (TokenSelection("all"), IMAGE, None, 9),
        (TokenSelection("patches"), IMAGE, None, 4), (TokenSelection("cls"), IMAGE, None, 1),
        (TokenSelection("last"), TEXT, 128, 1), (TokenSelection("mean"), IMAGE, None, 1),
        (TokenSelection("random_k", k=3), TEXT, 128, 3),
        (TokenSelection("positions", positions=(0, -1)), TEXT, 128, 2),
        (TokenSelection("all"), POOLED, 128, 1),
    ],
)  # fmt: skip
def test_the_most_rows_an_example_gives(selection, info, context, n):
    assert selection.rows_per_example(info, context) == n


OPTIONS = {"tokens": "all", "k": 4, "positions": [], "drop_special": True, "drop_positions": [0]}


def from_config(**changes) -> TokenSelection:
    found: TokenSelection = construct(
        TokenSelection.from_config, {**OPTIONS, **changes}, where="site", seed=5
    )
    return found


def test_options_become_a_selection():
    assert from_config() == TokenSelection("all", 4, (), True, (0,), 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": "positions"}, "site.positions is empty"),
        ({"tokens": "patch"}, r"site\.tokens=patch: .*Did you mean 'patches'"),
        ({"k": 0}, r"site\.k=0: must be > 0"),
        ({"drop_positions": [0, -1]}, r"site\.drop_positions=-1: must be >= 0"),
    ],
)
def test_bad_options_are_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message):
        from_config(**changes)


SITES = {
    info.name: info
    for info in (
        SiteInfo("embed", "wte", 4, "tokens", None),
        *(SiteInfo(f"blocks.{i}.resid_post", f"h.{i}", 4, "tokens", None) for i in range(3)),
        *(SiteInfo(f"blocks.{i}.mlp_out", f"h.{i}.mlp", 4, "tokens", None) for i in range(3)),
    )
}


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("embed", ["embed"]),
        ("h.1", ["blocks.1.resid_post"]),
        ("blocks.*.mlp_out", ["blocks.0.mlp_out", "blocks.1.mlp_out", "blocks.2.mlp_out"]),
        (["blocks.2.mlp_out", "embed", "wte"], ["embed", "blocks.2.mlp_out"]),
        ("blocks.[02].resid_post", ["blocks.0.resid_post", "blocks.2.resid_post"]),
    ],
)
def test_names_lists_and_globs_in_the_models_order(wanted, found):
    assert [info.name for info in resolve_sites(wanted, SITES)] == found


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("blocks.1.resid_pos", r"site\.name=blocks\.1\.resid_pos: .*mean 'blocks\.1\.resid_post'"),
        (["embed", "nothing*"], r"site\.name=nothing\*: no such site"),
        ([], "no site is named"),
    ],
)
def test_sites_that_are_not_there(wanted, message):
    with pytest.raises(ConfigError, match=message):
        resolve_sites(wanted, SITES)
