import copy

import numpy as np
import pytest
import torch

from sae_runner.errors import ConfigError
from sae_runner.saes import SAES
from sae_runner.saes.base import TrainState
from sae_runner.site import TokenSelection
from sae_runner.splice import kl_divergence, later_sites
from sae_runner.training.dead_latents import DEAD_LATENTS
from sae_runner.training.parts import Taken

STATE = TrainState(0.7, 0.5)
KINDS = [kind for kind in SAES.names() if kind not in ("transcoder", "matryoshka")]


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


# -- The formulas ----------------------------------------------------------------------------------


def test_kl_is_that_of_the_model_as_it_is_to_the_spliced_one():
    clean, spliced = (torch.tensor([p]).log() + 3 for p in ([0.5, 0.5], [0.9, 0.1]))
    assert kl_divergence(clean, spliced).item() == pytest.approx(0.510826, abs=1e-6)
    assert kl_divergence(spliced, clean).item() == pytest.approx(0.368064, abs=1e-6)
    assert kl_divergence(clean, clean).item() == 0


def test_kl_of_half_precision_is_computed_in_full():
    clean, spliced = torch.randn(2, 40, 300, generator=torch.Generator().manual_seed(0)).half()
    found = kl_divergence(clean, spliced)
    assert found.dtype == torch.float32
    log_p, log_q = (log_softmax(x.double().numpy()) for x in (clean, spliced))
    assert found.item() == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(-1).mean(), rel=1e-5)


@pytest.mark.parametrize("kind", ["relu", "topk", "gated"])
@pytest.mark.parametrize("output", ["token_logits", "class_logits"])
def test_the_loss_is_the_formula(host, inputs, selection, sae, objective, reference, kind, output):
    host.output = output
    kappa, gamma, rho = 0.5, 2.5, 0.3
    trained = sae(kind, l1_coefficient=0.1)
    loss = objective(
        trained, kl_coefficient=kappa, downstream_coefficient=gamma,
        reconstruction_coefficient=rho,
    ).loss(inputs, STATE)  # fmt: skip
    tokens, attended = inputs.tensors["tokens"].numpy(), inputs.attended.numpy()
    keep = attended.copy()
    keep[:, 0] = False  # Special, and dropped.
    clean, seen = reference(host, tokens)
    x = seen[0][keep]
    x_hat = trained(torch.from_numpy(x)).x_hat.detach().numpy()

    def change(values):
        return np.where(keep[..., None], 0, values) + put(keep, x_hat)

    spliced, changed = reference(host, tokens, change)
    log_p, log_q = log_softmax(clean), log_softmax(spliced)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)[attended].mean()
    if output == "class_logits":
        log_p, log_q = log_softmax(clean.mean(1)), log_softmax(spliced.mean(1))
        kl = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
    differences = [((seen[k] - changed[k]) ** 2)[attended].mean() for k in (1, 2)]
    assert differences[0] != pytest.approx(differences[1], rel=0.05)
    own = trained.loss(torch.from_numpy(x), STATE)
    error = next(iter(own.parts.values())).item()
    assert loss.parts["kl"].item() == pytest.approx(kl, rel=1e-10)
    assert loss.parts["downstream"].item() == pytest.approx(np.mean(differences), rel=1e-10)
    others = own.total.item() - error
    assert (others > 1e-3) == (kind != "topk")
    expected = kappa * kl + gamma * np.mean(differences) + rho * error + others
    assert loss.total.item() == pytest.approx(expected, rel=1e-10)
    np.testing.assert_allclose(loss.x.numpy(), x)
    assert torch.equal(loss.fired, own.fired) and loss.l0 == own.l0
    assert loss.parts.keys() == own.parts.keys() | {"kl", "downstream"}


def put(keep, rows):
    values = np.zeros((*keep.shape, rows.shape[1]))
    values[keep] = rows
    return values


@pytest.mark.parametrize("kind", ["relu", "topk", "gated", "p_anneal", "archetypal"])
def test_its_gradient_is_that_of_finite_differences(inputs, sae, objective, kind):
    trained = sae(kind, l1_coefficient=0.1)
    judge = objective(
        trained, kl_coefficient=1.0, downstream_coefficient=0.5, reconstruction_coefficient=0.2
    )
    judge.loss(inputs, STATE).total.backward()
    gradient = {
        name: p.grad.clone() for name, p in trained.named_parameters() if p.grad is not None
    }
    generator = torch.Generator().manual_seed(5)
    for name, parameter in trained.named_parameters():
        if kind == "gated" and name not in ("r_mag", "b_mag"):
            continue  # The gate's own error holds the decoder constant: no gradient of a function.
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * 1e-6 * direction)
            values.append(judge.loss(inputs, STATE).total.item())
            with torch.no_grad():
                parameter.sub_(sign * 1e-6 * direction)
        slope = (values[0] - values[1]) / 2e-6
        found = (gradient[name] * direction).sum().item()
        assert found == pytest.approx(slope, rel=1e-4, abs=1e-7), name


@pytest.mark.parametrize("kind", ["relu", "topk"])
def test_the_sites_own_error_alone_is_local_training(inputs, sae, objective, kind):
    trained = sae(kind, l1_coefficient=0.1)
    local = copy.deepcopy(trained)
    loss = objective(trained, reconstruction_coefficient=1.0).loss(inputs, STATE)
    own = local.loss(loss.x, STATE)
    assert loss.total.item() == pytest.approx(own.total.item(), rel=1e-12)
    loss.total.backward()
    own.total.backward()
    for (name, p), q in zip(trained.named_parameters(), local.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12, msg=name)


def test_a_perfect_reconstruction_changes_nothing(inputs, sae, objective):
    """Latents are the positive and the negative part of each number."""
    trained = sae("relu", l1_coefficient=0.0, input_scaling="none", b_dec_init="zero")
    d = trained.d_in
    with torch.no_grad():
        trained.W_enc_rows.zero_()
        trained.W_dec.zero_()
        for i in range(d):
            for row, sign in ((i, 1.0), (d + i, -1.0)):
                trained.W_enc_rows[row, i] = trained.W_dec[row, i] = sign
    loss = objective(trained, kl_coefficient=1.0, downstream_coefficient=1.0).loss(inputs, STATE)
    assert loss.parts["kl"].item() == 0 and loss.parts["downstream"].item() == 0
    torch.testing.assert_close(loss.x_hat, loss.x)


# -- What is trained -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns_from_the_output_alone(inputs, sae, objective, kind):
    trained = sae(kind)
    loss = objective(trained, kl_coefficient=1.0).loss(inputs, STATE)
    (loss.total - loss.rest).backward()
    moved = {
        name for name, p in trained.named_parameters() if (p.grad is not None and p.grad.any())
    }
    assert "b_dec" in moved and moved & {"W_dec", "mixture"}
    assert kind == "matching_pursuit" or "W_enc_rows" in moved


@pytest.mark.parametrize("kind", ["relu", "batch_topk"])
def test_dead_latents_predict_the_residual_of_the_site(inputs, sae, objective, kind):
    trained = sae(kind)
    loss = objective(trained, kl_coefficient=1.0).loss(inputs, STATE)
    auxk = {"type": "auxk", "coefficient": 0.1, "k_aux": 4}
    strategy = DEAD_LATENTS.build(auxk, sae=trained, window=1)
    strategy.update(torch.zeros(16, dtype=torch.int64), 5)
    both = strategy.add_to(loss, loss.x)
    own = strategy.add_to(trained.loss(loss.x, STATE), loss.x)
    assert own.parts["auxk"] > 0 and torch.equal(both.parts["auxk"], own.parts["auxk"])
    expected = loss.total.item() + 0.1 * own.parts["auxk"].item()
    assert both.total.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["relu", "topk"])
def test_gradients_reach_the_sae_and_nothing_else(host, inputs, sae, objective, kind):
    before = copy.deepcopy(host.network.state_dict())
    trained = sae(kind)
    objective(trained, kl_coefficient=1.0, downstream_coefficient=1.0).loss(
        inputs, STATE
    ).total.backward()
    assert all(torch.equal(v, before[k]) for k, v in host.network.state_dict().items())
    for name, parameter in trained.named_parameters():
        assert parameter.grad.abs().max() > 1e-8, name


def test_only_selected_tokens_are_replaced(host, inputs, sae, objective):
    """Positions keep what is before the first token that is replaced: nothing reaches back."""
    last = TokenSelection("positions", positions=(-1,))
    loss = objective(sae("topk"), selection=last, kl_coefficient=1.0).loss(inputs, STATE)
    assert len(loss.x) == 3  # The last of each text that is no padding.
    with torch.no_grad():
        found = host.record(inputs, ["blocks.0.resid_post"])["blocks.0.resid_post"]
    assert torch.equal(loss.x, found[torch.arange(3), torch.tensor([4, 3, 2])])


def test_autocast_leaves_the_model_in_its_own_precision(host, inputs, sae, objective):
    host.network.float()
    trained = sae("relu").float()
    judge = objective(trained, kl_coefficient=1.0)
    seen = []
    forward = host.forward
    host.forward = lambda x: (seen.append(torch.is_autocast_enabled("cpu")), forward(x))[1]
    with torch.autocast("cpu", torch.bfloat16):
        loss = judge.loss(inputs, STATE)
    assert seen == [False, False] and loss.x.dtype == torch.float32


# -- Which sites, and what is refused --------------------------------------------------------------


@pytest.mark.parametrize(
    ("site", "wanted", "expected"),
    [
        ("blocks.0.resid_post", None, ["blocks.1.resid_post", "blocks.2.resid_post"]),
        ("blocks.1.resid_pre", None, ["blocks.1.resid_post", "blocks.2.resid_post"]),
        ("blocks.1.mlp_out", None, ["blocks.2.resid_post"]),
        ("blocks.0.resid_post", ["blocks.2.*"],
         ["blocks.2.resid_pre", "blocks.2.mlp_out", "blocks.2.resid_post"]),
        ("blocks.1.mlp_out", ["blocks.1.resid_post"], ["blocks.1.resid_post"]),
    ],
)  # fmt: skip
def test_later_sites(host, site, wanted, expected):
    assert [
        info.name for info in later_sites(host, host.sites()[site], wanted, "sites")
    ] == expected


@pytest.mark.parametrize(
    ("site", "wanted", "message"),
    [
        ("blocks.2.resid_post", None, "downstream_sites=null: no block comes after blocks.2.resid"),
        ("blocks.1.mlp_out", ["blocks.0.mlp_out"],
         "downstream_sites=blocks.0.mlp_out: does not come after blocks.1.mlp_out"),
        ("blocks.1.mlp_out", ["blocks.1.mlp_out"], "blocks.1.mlp_out: does not come after"),
        ("blocks.0.mlp_out", ["blocks.9.mlp_out"],
         "trainer.objective.downstream_sites=blocks.9.mlp_out: no such site. Did you mean"),
    ],
)  # fmt: skip
def test_sites_that_are_not_later_are_refused(host, site, wanted, message):
    with pytest.raises(ConfigError) as error:
        later_sites(host, host.sites()[site], wanted, "trainer.objective.downstream_sites")
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "sae_options", "options", "message"),
    [
        ("matryoshka", {"d_sae": 64}, {}, "sae=matryoshka: each prefix of its latents reconstruct"),
        ("topk", {"multi_topk": 0.125}, {}, "sae=topk: sae.multi_topk is a second error"),
        ("topk", {}, {"kl_coefficient": 0.0}, "kl_coefficient=0: nothing is left to minimise"),
        ("topk", {}, {"selection": TokenSelection("mean")}, "site.tokens=mean: an average of"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_so_is_refused(sae, objective, kind, sae_options, options, message):
    with pytest.raises(ConfigError) as error:
        objective(sae(kind, **sae_options), **({"kl_coefficient": 1.0} | options))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_model_without_logits_has_no_kl(host, inputs, sae, objective):
    host.output = "features"
    with pytest.raises(ConfigError, match=r"kl_coefficient=0\.5: not applicable: .* no logits"):
        objective(sae("topk"), kl_coefficient=0.5, downstream_coefficient=1.0)
    loss = objective(sae("topk"), downstream_coefficient=1.0).loss(inputs, STATE)
    assert "kl" not in loss.parts and loss.parts["downstream"] > 0


# -- Parts of a batch, and what is run -------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("output", ["token_logits", "class_logits"])
def test_parts_of_padded_texts_give_the_gradient_of_the_whole(
    host, inputs, sae, objective, output, size
):
    """Texts of 5, 4 and 3 tokens, of which 3, 2 and 1 are rows: neither is as the examples are."""
    host.output = output
    gradients, losses = [], []
    for parts in ([inputs], inputs.split(size)):
        trained = sae("relu", l1_coefficient=0.1)
        few = TokenSelection("all", drop_positions=(0, 1))
        judge = objective(
            trained, selection=few, kl_coefficient=1.0, downstream_coefficient=0.5,
            reconstruction_coefficient=0.2,
        )  # fmt: skip
        taken = Taken(trained, torch.zeros(trained.d_in, dtype=torch.float64))
        for part, share in zip(parts, judge.shares(parts), strict=True):
            loss = judge.loss(part, STATE, share)
            (loss.total * share.rows).backward()
            taken.add(loss)
        losses.append({"total": taken.total, **taken.parts})
        gradients.append({name: p.grad for name, p in trained.named_parameters()})
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("site", "expected"),
    [
        ("blocks.0.resid_post", [1, 2, 2]), ("blocks.1.resid_pre", [1, 2, 2]),
        ("blocks.1.resid_post", [1, 1, 2]), ("blocks.1.mlp_out", [2, 2, 2]),
    ],
)  # fmt: skip
def test_blocks_before_the_site_run_once(host, inputs, sae, objective, site, expected):
    def judged():
        trained, runs = sae("topk"), [0, 0, 0]
        judge = objective(trained, site=site, kl_coefficient=1.0, downstream_coefficient=1.0)
        for i, block in enumerate(host.network.blocks):
            block.mlp.register_forward_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
        loss = judge.loss(inputs, STATE)
        loss.total.backward()
        return loss.total, [p.grad for p in trained.parameters()], runs

    *whole, runs = judged()
    assert runs == [2, 2, 2]
    host.block_paths = [f"blocks.{i}" for i in range(3)]
    *found, runs = judged()
    assert runs == expected
    assert torch.equal(found[0], whole[0])
    assert all(torch.equal(a, b) for a, b in zip(found[1], whole[1], strict=True))
