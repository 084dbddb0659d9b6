"""Steps in float32 on few entries, against dense definitions in float64: the papers' formulas."""

import copy
import random
from types import SimpleNamespace

import pytest
import torch

from sae_runner.config import preset
from sae_runner.kernels import native_ops, selection
from sae_runner.kernels.choice import using
from sae_runner.saes import SAES, base
from sae_runner.saes.base import TrainState
from sae_runner.training.dead_latents import DEAD_LATENTS

native = pytest.mark.skipif(not native_ops.available(), reason="no C++ compiler")
OF_KERNELS = pytest.mark.parametrize("kernels", ["torch", pytest.param("auto", marks=native)])
D_OUT, SILENT, STATE = 9, 3, TrainState(penalty=0.7)
AUXK = {"type": "auxk", "coefficient": 0.5, "k_aux": 5}
TO_FLOAT32, TO_SCREEN = 3e-6, 1e-6
"""Norms of what may be off, relative to what is right."""

FREE = {"decoder_norm": "free"}
MEAN_OF_PREFIXES = {"group_fractions": [0.125, 0.375, 0.5], "group_reduction": "mean"}
JUMPS = {"initial_threshold": 0.5, "bandwidth": 0.3}
CHOOSING = {
    "topk": ("topk", {}),
    "topk_row_norm": ("topk", {"loss_reduction": "row_norm", "input_scaling": "none"}),
    "topk_not_centred": ("topk", FREE | {"apply_b_dec_to_input": False}),
    "multi_topk": ("topk", {"multi_topk": 0.125, "loss_reduction": "mean"}),
    "groupmax": ("topk", {"selection": "groupmax"}),
    "abstopk": ("topk", {"selection": "abstopk"}),
    "batch_topk": ("batch_topk", {}),
    "matryoshka": ("matryoshka", {"group_fractions": [0.25, 0.75]}),
    "matryoshka_mean": ("matryoshka", {"loss_reduction": "sum"} | MEAN_OF_PREFIXES),
    "archetypal": ("archetypal", {"n_candidates": 21}),
    "transcoder": ("transcoder", {}),
    "transcoder_as_it_is": ("transcoder", {"input_scaling": "none", "skip": True}),
}
ABOVE = {
    "relu": ("relu", {}),
    "relu_of_2023": (
        "relu", {"decoder_norm": "unit", "decoder_init_norm": 1, "apply_b_dec_to_input": True},
    ),
    "gated": ("gated", {}),
    "gated_free": ("gated", FREE),
    "p_anneal": ("p_anneal", {"p_start": 0.5, "p_end": 0.5}),
    "p_anneal_free": ("p_anneal", {"p_start": 1.0, "p_end": 1.0} | FREE),
    "jump_relu": ("jump_relu", JUMPS | {"l0_coefficient": 0.1}),
    "jump_relu_quadratic": ("jump_relu", JUMPS | {"penalty": "quadratic", "target_l0": 4}),
    "jump_relu_tanh": ("jump_relu", JUMPS | {"penalty": "tanh", "l0_coefficient": 0.1}),
    "jump_relu_low": ("jump_relu", JUMPS | {"initial_threshold": 0.1}),
}  # fmt: skip


def random_shape(seed):
    """d_in, d_sae, n and k, all odd; k divides d_sae, of which 4 k latents are few."""
    drawn = random.Random(seed)
    k = drawn.choice([3, 5, 7])
    least = 4 * (4 * k + max(16, 2 * k)) // k + 1
    return 2 * drawn.randint(3, 20) + 1, k * (2 * (least // 2 + drawn.randint(0, 6)) + 1), \
        2 * drawn.randint(8, 40) + 1, k  # fmt: skip


SHAPES = [*map(random_shape, range(3)), (24, 352, 64, 5)]
EXTREMES = [(13, 97, 29, 1), (11, 83, 37, 82)]


@pytest.fixture(autouse=True)
def _chunks_and_few_entries(monkeypatch, one_thread):
    monkeypatch.setattr(selection, "CHUNK_BYTES", {"cpu": 20_000, "cuda": 0})
    monkeypatch.setattr(selection, "LEAST_ROWS", 7)
    monkeypatch.setattr(base, "ENCODE_CHUNK_BYTES", 20_000)
    monkeypatch.setattr(base, "FEW", 2.0)


def problem(named, shape, copies=1):
    """An SAE of random weights and rows for it: in the first none fires, nor do the first latents.

    Each latent is there `copies` times, side by side.
    """
    (kind, options), (d_in, d_sae, n, k) = named, shape
    cfg = preset("sae", kind) | {"d_sae": d_sae, "expansion": None, "units": None}
    if options.get("selection") == "groupmax" and d_sae % k:
        k = d_sae
    cfg |= options | ({"k": k} if "k" in cfg else {})
    outputs = {"d_out": D_OUT} if kind == "transcoder" else {}
    sae = SAES.build(cfg, d_in=d_in, **outputs)
    generator = torch.Generator().manual_seed(d_sae + n)
    draw = lambda *size: torch.randn(size, generator=generator)  # noqa: E731
    x = 3 * draw(n, d_in + outputs.get("d_out", 0)) + 1
    with torch.no_grad():
        for name, p in sae.named_parameters():
            own = name in sae.rows_by_latent()
            drawn = draw(d_sae // copies, *p.shape[1:]) if own else draw(*p.shape)
            p.copy_(drawn.repeat_interleave(copies, 0) if own else drawn).mul_(d_in**-0.5)
        # All that a row sees that is zero where it is encoded.
        sae.b_enc.copy_(-0.2 - d_in**0.5 * sae.b_enc.abs())
        if sae.options.get("selection") != "abstopk":
            sae.b_enc[: SILENT * copies] = -1e3
        if kind == "jump_relu":
            sae.threshold.mul_(0.2).add_(sae.initial_threshold).abs_()
        scales = {"input_scale": 0.7, "target_scale": 2.5} if sae.input_scaling != "none" else {}
        for name, value in {"mean_baseline_mse": 1.7, **scales}.items():
            if hasattr(sae, name):
                getattr(sae, name).fill_(value)
        if kind == "archetypal":
            sae.candidates.copy_(draw(*sae.candidates.shape))
        x[0] = 0
        if sae.apply_b_dec_to_input:
            x[0] = sae.b_dec / sae.input_scale
    return sae, x


# -- The definitions -------------------------------------------------------------------------------


def kept(scores, k):
    """Ones at the k largest of each row."""
    return torch.zeros_like(scores).scatter(1, scores.topk(k, dim=1).indices, 1.0)


def reduced(sae, target, x_hat):
    """The squared error as `loss_reduction` says."""
    square = (target - x_hat).square().sum(1)
    match sae.loss_reduction:
        case "sum":
            return square.mean()
        case "row_norm":
            return (square / target.norm(dim=1)).mean() / sae.d_out
        case "normalised":
            return square.mean() / sae.d_out / sae.mean_baseline_mse
    return square.mean() / sae.d_out


def latents_of(sae, p, z):
    """Dense latents in training, and for a jump its step, with pseudo-derivatives."""
    match sae.kind, sae.options.get("selection"):
        case _, "topk":
            return (z * kept(z, sae.k)).relu(), None
        case _, "abstopk":
            return z * kept(z.abs(), sae.k), None
        case _, "groupmax":
            groups = z.unflatten(1, (sae.k, -1))
            best = torch.zeros_like(groups).scatter(2, groups.argmax(2, keepdim=True), 1.0)
            return (z * best.flatten(1)).relu(), None
        case "batch_topk" | "matryoshka", _:
            return (z * kept(z.reshape(1, -1), int(sae.k * len(z))).view_as(z)).relu(), None
        case "gated", _:
            magnitude = p.r_mag.exp() * (z - p.b_enc) + p.b_mag
            return (z > 0) * magnitude.relu(), None
        case "jump_relu", _:
            seen = z if sae.penalty == "tanh" else z.relu()
            near = ((seen - p.threshold).abs() < sae.bandwidth / 2) / sae.bandwidth
            moved = near * (p.threshold.detach() - p.threshold)  # Zeros, with a derivative.
            if sae.penalty == "tanh":
                moved = moved + near * (z - z.detach())
            return z * (z > p.threshold) + p.threshold.detach() * moved, (z > p.threshold) + moved
    return z.relu(), None


def sparsity(sae, p, z, f, step, frozen):
    """The weighted terms beside the error of all latents."""
    n = len(z)
    match sae.kind, sae.options.get("penalty"):
        case "relu", _:
            return sae.l1_coefficient * STATE.penalty * (f * p.W_dec.norm(dim=1)).sum() / n
        case "gated", _:
            weights = frozen.norm(dim=1) if sae.decoder_norm == "free" else 1.0
            return sae.l1_coefficient * STATE.penalty * (z.relu() * weights).sum() / n
        case "p_anneal", _:
            lengths = f * p.W_dec.norm(dim=1) if sae.decoder_norm == "free" else f
            powers = (lengths + sae.epsilon) ** sae.p_end - sae.epsilon**sae.p_end
            return sae.sparsity_coefficient * STATE.penalty * powers.sum() / n
        case _, "step":
            return sae.l0_coefficient * STATE.penalty * step.sum() / n
        case _, "quadratic":
            return sae.l0_coefficient * STATE.penalty * (step.sum() / n / sae.target_l0 - 1) ** 2
        case _, "tanh":
            sizes = (sae.tanh_scale * f * p.W_dec.norm(dim=1)).tanh()
            return sae.l0_coefficient * STATE.penalty * sizes.sum() / n
    return 0.0


def definition(sae, x, dead=None):
    """Loss, x̂ and latents, all of them dense."""
    p = SimpleNamespace(**dict(sae.named_parameters()))
    s = sae.input_scale * x[:, : sae.d_in]
    target, unit, shift = s, sae.input_scale, p.b_dec
    if sae.kind == "transcoder":
        target, unit = sae.target_scale * x[:, sae.d_in :], sae.target_scale
        shift = p.b_dec + s @ p.W_skip.T if sae.skip else p.b_dec
    if sae.kind == "archetypal":
        p.W_dec = p.log_scale.exp() * (p.mixture @ sae.candidates + p.relaxation)
    z = (s - p.b_dec if sae.apply_b_dec_to_input else s) @ p.W_enc_rows.T + p.b_enc
    f, step = latents_of(sae, p, z)
    x_hat = f @ p.W_dec + shift
    total = reduced(sae, target, x_hat) + sparsity(sae, p, z, f, step, p.W_dec.detach())
    if sae.kind == "gated":
        total = total + reduced(sae, target, z.relu() @ p.W_dec.detach() + p.b_dec.detach())
    if sae.kind == "matryoshka":
        firsts = [f[:, :m] @ p.W_dec[:m] + shift for m in sae.widths[:-1]]
        total = total + sum(reduced(sae, target, first) for first in firsts)
        total = total / len(sae.widths) if sae.group_reduction == "mean" else total
    if sae.options.get("multi_topk"):
        more = (z * kept(z, min(4 * sae.k, sae.d_sae))).relu()
        total = total + sae.multi_topk * reduced(sae, target, more @ p.W_dec + shift)
    if dead is not None and dead.any():
        e = (target - x_hat).detach()
        z, k_aux = z[:, dead], min(AUXK["k_aux"], int(dead.sum()))
        signed = sae.options.get("selection") == "abstopk"
        strongest = z * kept(z.abs(), k_aux) if signed else (z * kept(z, k_aux)).relu()
        share = (strongest @ p.W_dec[dead] - e).square().mean() / (e - e.mean(0)).square().mean()
        total = total + AUXK["coefficient"] * min(dead.sum() / AUXK["k_aux"], 1) * share
    return total, x_hat / unit, f


# -- Comparing -------------------------------------------------------------------------------------


def by_definition(sae, x, dead=None):
    """What a step sees, by name, and the latents."""
    exact = copy.deepcopy(sae).double()
    total, x_hat, f = definition(exact, x.double(), dead)
    total.backward()
    gradients = {name: p.grad for name, p in exact.named_parameters()}
    return {"total": total.detach(), "x_hat": x_hat.detach(), **gradients}, f.detach()


def by_few(sae, x, kernels, precision, dead=None):
    """The same of the library, with how often latents fired, and whether it screened."""
    sae = copy.deepcopy(sae)
    sae.selector.precision = precision
    with using(kernels):
        loss = sae.loss(x, STATE)
        if dead is not None:
            auxk = DEAD_LATENTS.build(AUXK, sae=sae, window=10)
            auxk.rows_since_fired[dead] = 10
            loss = auxk.add_to(loss, sae.input_of(x))
        loss.total.backward()
    gradients = {name: p.grad for name, p in sae.named_parameters()}
    found = {"total": loss.total.detach(), "x_hat": loss.x_hat.detach(), "fired": loss.fired}
    screened = any(buffer.dtype == torch.bfloat16 for buffer in sae.selector.buffers())
    return found | gradients, screened


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        off = (found[name].double() - right).norm() / right.norm()
        assert off <= tolerance, (name, float(off))


def pooled(sae, tensors, copies):
    """The same with equal latents summed: they share what is theirs in any way."""
    own = {*sae.rows_by_latent(), "fired"}
    return {
        name: t.unflatten(0, (-1, copies)).sum(1) if name in own else t
        for name, t in tensors.items()
    }


def assert_defined(sae, x, kernels, *, screens, dead=None, copies=1):
    """Both precisions give what is defined, and the screened one what float32 gives."""
    expected, f = by_definition(sae, x, dead)
    expected = pooled(sae, expected | {"fired": (f != 0).sum(0)}, copies)
    fired, results = expected.pop("fired"), []
    for precision in ("fp32", "screened"):
        found, screened = by_few(sae, x, kernels, precision, dead)
        assert screened == (screens and precision == "screened")
        found = pooled(sae, found, copies)
        assert found.pop("fired").equal(fired)
        assert_close(found, expected, TO_FLOAT32)
        for name, right in expected.items():
            assert not found[name][right == 0].any(), name
        results.append(found)
    assert_close(results[1], results[0], TO_SCREEN)
    return expected, f


def screens(named, shape):
    """Whether there is something to screen."""
    kind, options = named
    if "selection" not in preset("sae", kind):
        return True
    k = shape[3] * (4 if options.get("multi_topk") else 1)
    few = 4 * (k + max(16, k // 2)) < shape[1]
    return few and options.get("selection", "topk") == "topk"


@OF_KERNELS
@pytest.mark.parametrize("shape", SHAPES + EXTREMES, ids=str)
@pytest.mark.parametrize("name", CHOOSING | ABOVE)
def test_loss_and_gradients_are_the_dense_definitions(name, shape, kernels):
    named = (CHOOSING | ABOVE)[name]
    sae, x = problem(named, shape)
    expected, f = assert_defined(sae, x, kernels, screens=screens(named, shape))
    if name != "abstopk":
        assert not f[0].any() and not f[:, :SILENT].any()
        assert not expected["W_enc_rows"][:SILENT].any()
    if not sae.calibrates:
        with using(kernels):
            used = sae.encode_sparse(sae.input_of(x)).dense().detach()
        assert_close({"f": used}, {"f": f}, TO_FLOAT32)


@OF_KERNELS
@pytest.mark.parametrize("k", [1, 6, 7])
@pytest.mark.parametrize("name", CHOOSING)
def test_of_equal_latents_each_is_chosen_at_most_once(name, k, kernels):
    """Of three that are equal all are where k is a multiple of three, else it is all one which."""
    shape, named = (15, 336, 37, k), CHOOSING[name]
    sae, x = problem(named, shape, copies=3)
    whole = k == 6 and name != "groupmax"
    copies = 1 if whole else 3
    f = assert_defined(sae, x, kernels, screens=screens(named, shape), copies=copies)[1]
    firing = (f.unflatten(1, (-1, 3)) != 0).sum(2)
    assert whole == bool((firing % 3 == 0).all())


@OF_KERNELS
@pytest.mark.parametrize("n_dead", [0, 2, 40])
@pytest.mark.parametrize("name", CHOOSING)
def test_dead_latents_predict_the_residual(name, n_dead, kernels):
    named, shape = CHOOSING[name], SHAPES[0]
    sae, x = problem(named, shape)
    dead = torch.zeros(sae.d_sae, dtype=torch.bool)
    dead[SILENT : SILENT + n_dead] = True
    expected = assert_defined(sae, x, kernels, screens=screens(named, shape), dead=dead)[0]
    alone = by_definition(sae, x)[0]
    assert (expected["total"] > alone["total"]) == (n_dead > 0)
