"""What holds for the parts of the base, and for every architecture there is."""

import copy

import numpy as np
import pytest
import torch

from sae_runner.config import preset
from sae_runner.errors import ConfigError, StoreError
from sae_runner.saes import SAES, base
from sae_runner.saes._initialisation import geometric_median, random_directions
from sae_runner.saes.base import Latents, TrainState, sum_rows, width
from sae_runner.statistics import ActivationStats

# A transcoder reconstructs another site: test_transcoder.py.
KINDS = [name for name in SAES.names() if name != "transcoder"]
every_kind = pytest.mark.parametrize("kind", KINDS)

# Empty first, middle and last rows; negative and unsorted-looking values.
DENSE = torch.tensor(
    [[0, 0, 0, 0], [1, 0, -2, 0], [0, 0, 0, 0], [0, 5, 0, 0.5], [3, 1, 2, 4], [0, 0, 0, 0]],
    dtype=torch.float32,
)


def test_latents_of_dense_are_csr():
    latents = Latents.from_dense(DENSE)
    assert latents.offsets.tolist() == [0, 0, 2, 2, 4, 8, 8]
    assert latents.indices.tolist() == [0, 2, 1, 3, 0, 1, 2, 3]
    assert latents.values.tolist() == [1, -2, 5, 0.5, 3, 1, 2, 4]
    assert latents.counts.tolist() == [0, 2, 0, 2, 4, 0]
    assert latents.rows.tolist() == [1, 1, 3, 3, 4, 4, 4, 4]
    assert len(latents) == 6
    assert torch.equal(latents.dense(), DENSE)


@pytest.mark.parametrize("shape", [(3, 5), (0, 5), (1, 1)])
def test_latents_without_entries(shape):
    latents = Latents.from_dense(torch.zeros(shape))
    assert (len(latents), len(latents.values), latents.d_sae) == (shape[0], 0, shape[1])
    assert torch.equal(latents.dense(), torch.zeros(shape))
    assert torch.equal(latents.counts, torch.zeros(shape[0], dtype=torch.int64))


def test_latents_of_topk_drop_zeros_and_sort():
    values = torch.tensor([[0.0, 2.0, 1.0], [0.0, 0.0, 0.0], [7.0, 0.0, 8.0]])
    indices = torch.tensor([[0, 3, 1], [2, 1, 0], [3, 1, 0]])
    latents = Latents.from_topk(values, indices, 4)
    assert latents.offsets.tolist() == [0, 2, 2, 4]
    assert latents.indices.tolist() == [1, 3, 0, 3]
    assert latents.values.tolist() == [1, 2, 8, 7]


def test_latents_concatenate():
    parts = [Latents.from_dense(DENSE[rows]) for rows in (slice(0, 1), slice(1, 1), slice(1, 6))]
    assert torch.equal(Latents.concatenate(parts).dense(), DENSE)
    assert Latents.concatenate(parts).offsets.tolist() == [0, 0, 2, 2, 4, 8, 8]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dense", [DENSE, torch.zeros(3, 4)])
def test_sum_rows_is_the_matrix_product_and_so_is_its_gradient(dense, dtype):
    weights = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    acts = dense.clone().requires_grad_()
    latents = Latents.from_dense(acts)
    sparse = sum_rows(weights, latents.indices.to(dtype), latents.values, latents.offsets)
    torch.testing.assert_close(sparse, dense @ weights)
    target = torch.arange(len(dense) * 3.0).reshape(-1, 3)
    from_sparse = torch.autograd.grad(sparse, (weights, acts), target)
    from_dense = torch.autograd.grad(acts @ weights, (weights, acts), target)
    torch.testing.assert_close(from_sparse[0], from_dense[0])
    # Sparse latents have no gradient where they are zero.
    torch.testing.assert_close(from_sparse[1], from_dense[1] * (dense != 0))


def test_sum_rows_of_k_chosen_latents():
    weights = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    indices, values = torch.tensor([[0, 4], [2, 2]]), torch.tensor([[1.0, 2.0], [0.5, -3.0]])
    expected = torch.stack([weights[0] + 2 * weights[4], -2.5 * weights[2]])
    torch.testing.assert_close(sum_rows(weights, indices, values), expected)


def test_width_takes_exactly_one():
    assert width(128, None, 8.0) == 1024
    assert width(10, None, 0.25) == 2
    assert width(10, None, 0.001) == 1
    assert width(128, 300, None) == 300
    with pytest.raises(ConfigError, match=r"sae\.d_sae=1048577 and sae\.expansion=2: both"):
        width(8, 1_048_577, 2.0)
    with pytest.raises(ConfigError, match="neither given; exactly one is needed"):
        width(8, None, None)


@every_kind
def test_width_is_checked_by_every_kind(new, kind):
    with pytest.raises(ConfigError, match="both given"):
        new(kind, 8, 24, expansion=2.0)


# -- Initialisation ------------------------------------------------------------------------------


def test_geometric_median_of_a_convex_quadrilateral_is_where_its_diagonals_cross():
    corners = torch.tensor([[0.0, 0.0], [4.0, 4.0], [3.0, 0.0], [0.0, 6.0]], dtype=torch.float64)
    # The diagonals y = x and y = 6 − 2x.
    median = geometric_median(corners, iterations=10_000, tolerance=1e-12)
    np.testing.assert_allclose(median, [2.0, 2.0], atol=1e-6)


def test_geometric_median_ignores_an_outlier_and_survives_equal_rows():
    x = torch.cat([torch.zeros(9, 2), torch.full((1, 2), 1e6)])
    assert geometric_median(x).abs().max() < 1.0
    assert x.mean(0).min() > 1e4
    assert torch.equal(geometric_median(torch.ones(5, 3)), torch.ones(3))


def test_random_directions_are_unit_and_centred():
    drawn = random_directions(4_000, 5, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.norm(dim=1), torch.ones(4_000))
    assert drawn.mean(0).abs().max() < 4 * (1 / 5 / 4_000) ** 0.5
    torch.testing.assert_close(drawn.T @ drawn / 4_000, torch.eye(5) / 5, atol=0.02, rtol=0)


@every_kind
def test_initialise_draws_from_its_generator_only(new, stats, rows, kind):
    before = torch.get_rng_state()
    first, again, other = (new(kind, 8, 24, encoder_init="transposed") for _ in range(3))
    for sae, seed in ((first, 5), (again, 5), (other, 6)):
        sae.initialise(stats(rows(50)), torch.Generator().manual_seed(seed))
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name
    assert not torch.equal(first.W_dec, other.W_dec)
    assert torch.equal(first.W_enc, first.W_dec.T)
    tied = "W_enc" not in first.tensors()
    assert (first.W_enc_rows.data_ptr() == first.W_dec.data_ptr()) == tied


@every_kind
@pytest.mark.parametrize("scaling", ["none", "sqrt_d", "unit_mean_square"])
def test_input_scale_brings_activations_to_a_standard_size(new, stats, rows, kind, scaling):
    x = rows(50)
    sae = new(kind, 8, 24, input_scaling=scaling)
    sae.initialise(stats(x), torch.Generator())
    norms = np.linalg.norm(sae.scaled(x).numpy(), axis=1)
    if scaling == "none":
        assert torch.equal(sae.scaled(x), x)
    elif scaling == "sqrt_d":
        assert norms.mean() == pytest.approx(8**0.5, rel=1e-6)
    else:
        assert (norms**2).mean() == pytest.approx(1.0, rel=1e-6)


# -- The map, for every architecture ---------------------------------------------------------------


@every_kind
def test_sparse_is_dense(make, rows, kind):
    sae, x = make(kind), rows(40)
    acts, latents = sae.encode(x), sae.encode_sparse(x)
    assert 0 < len(latents.values) < acts.numel()
    torch.testing.assert_close(latents.dense(), acts)
    torch.testing.assert_close(sae.decode(latents), sae.decode(acts))
    torch.testing.assert_close(sae(x).x_hat, sae.decode(acts))
    assert len(sae.encode_sparse(x[:0])) == 0
    assert sae(x[:0]).x_hat.shape == (0, 8)


@every_kind
def test_decode_is_affine_in_the_units_of_x(make, rows, kind):
    sae, x = make(kind), rows(40)
    f, s = sae.encode(x).detach().double().numpy(), sae.input_scale.item()
    w, b = (p.detach().double().numpy() for p in (sae.W_dec, sae.b_dec))
    assert s != 1
    np.testing.assert_allclose(sae(x).x_hat.detach(), (f @ w + b) / s, rtol=1e-4, atol=1e-5)


@every_kind
def test_encode_sparse_in_chunks(make, rows, kind, monkeypatch):
    sae, x = make(kind), rows(41)
    whole, seen = sae.encode_sparse(x), []
    monkeypatch.setattr(base, "ENCODE_CHUNK_BYTES", 10 * sae.d_sae * 4)
    chunk = sae.encode_chunk
    monkeypatch.setattr(sae, "encode_chunk", lambda part: seen.append(len(part)) or chunk(part))
    parts = sae.encode_sparse(x)
    assert seen == [10, 10, 10, 10, 1]
    assert torch.equal(parts.offsets, whole.offsets)
    assert torch.equal(parts.indices, whole.indices)
    torch.testing.assert_close(parts.values, whole.values)


@every_kind
def test_gradients_reach_x_through_the_sparse_path(make, rows, kind):
    sae, x = make(kind), rows(6).requires_grad_()
    weight = rows(6, seed=9)
    (sparse,) = torch.autograd.grad((sae(x).x_hat * weight).sum(), x)
    (dense,) = torch.autograd.grad((sae.decode(sae.encode(x)) * weight).sum(), x)
    assert dense.abs().max() > 0.01
    torch.testing.assert_close(sparse, dense)


@every_kind
@pytest.mark.parametrize("scaling", ["none", "sqrt_d", "unit_mean_square"])
def test_fold_changes_units_only(make, rows, kind, scaling):
    sae, x = make(kind, input_scaling=scaling).double(), rows(40).double()
    before, loss = sae(x), sae.loss(x, TrainState())
    scale = sae.input_scale.item()
    assert sae.fold() is sae
    after = sae(x)
    assert sae.input_scale.item() == 1.0
    torch.testing.assert_close(after.x_hat, before.x_hat, rtol=1e-6, atol=1e-9)
    assert torch.equal(after.latents.indices, before.latents.indices)
    torch.testing.assert_close(sae.loss(x, TrainState()).x_hat, loss.x_hat, rtol=1e-6, atol=1e-9)
    assert scale == 1.0 if scaling == "none" else scale != 1.0


@every_kind
def test_unfold_takes_a_folded_sae_back_to_training(make, rows, kind):
    sae, x = make(kind).double(), rows(40).double()
    state, like = TrainState(0.5), copy.deepcopy(sae)
    before, loss = sae(x).x_hat, sae.loss(x, state)
    assert sae.fold().unfold_like(like) is sae
    assert sae.input_scale.item() == pytest.approx(like.input_scale.item())
    torch.testing.assert_close(sae(x).x_hat, before, rtol=1e-6, atol=1e-9)
    again = sae.loss(x, state)
    assert again.total.item() == pytest.approx(loss.total.item(), rel=1e-6)
    for name, part in loss.parts.items():
        assert again.parts[name].item() == pytest.approx(part.item(), rel=1e-6), name


@every_kind
def test_fold_in_single_precision(make, rows, kind):
    sae, x = make(kind), rows(200)
    before = sae(x).x_hat
    after = sae.fold()(x).x_hat
    assert (after - before).norm() / before.norm() < 1e-6


# -- Training, for every architecture --------------------------------------------------------------


@every_kind
def test_loss_reports_what_the_map_does(make, rows, kind):
    sae, x = make(kind), rows(40)
    if sae.calibrates:  # The threshold of these rows selects what training does.
        sae.calibrate(iter([x[:9], x[9:]]), len(x))
    loss = sae.loss(x, TrainState())
    acts = sae.encode(x).detach().numpy()
    torch.testing.assert_close(loss.x_hat, sae(x).x_hat)
    assert loss.x is x
    torch.testing.assert_close(loss.error + loss.rest, loss.total)
    assert loss.fired.tolist() == (acts != 0).sum(0).tolist()
    assert loss.l0.item() == pytest.approx((acts != 0).sum(1).mean())
    assert loss.x_hat.requires_grad and not loss.residual.requires_grad
    assert not any(part.requires_grad for part in loss.parts.values())
    assert loss.total.requires_grad


@every_kind
def test_a_step_leaves_every_weight_finite_and_moves_it(make, rows, kind):
    sae, x = make(kind), rows(40)
    before = {name: tensor.clone() for name, tensor in sae.tensors().items()}
    optimiser = torch.optim.SGD(sae.parameters(), lr=0.01)
    sae.loss(x, TrainState()).total.backward()
    sae.before_step()
    optimiser.step()
    sae.after_step()
    bias = sae.stored_names.get("b_enc", "b_enc")
    names = {"W_enc", "W_dec", bias, "b_dec"} & before.keys()  # A tied decoder is all the encoder.
    assert {"W_dec", "W_enc"} & names and "b_dec" in names
    for name in names:
        assert sae.tensors()[name].isfinite().all()
        assert not torch.equal(sae.tensors()[name], before[name]), name


@every_kind
def test_bf16_autocast_trains_in_float32(make, rows, kind):
    sae, x = make(kind), rows(40)
    exact = sae.loss(x, TrainState())
    with torch.autocast("cpu", torch.bfloat16):
        loss = sae.loss(x, TrainState())
        x_hat = sae(x).x_hat
    loss.total.backward()
    assert loss.total.dtype == x_hat.dtype == torch.float32
    assert loss.total.item() == pytest.approx(exact.total.item(), rel=0.05)
    for parameter in sae.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@every_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_rows_of_any_precision_are_taken(make, rows, kind, dtype):
    sae, x = make(kind), rows(10).to(dtype)
    torch.testing.assert_close(sae(x).x_hat, sae(x.float()).x_hat)
    expected = sae.loss(x.float(), TrainState()).total
    torch.testing.assert_close(sae.loss(x, TrainState()).total, expected)


def test_parallel_gradient_is_removed_and_only_that(make):
    sae = make("topk")
    gradient = torch.randn(24, 8, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        sae.W_dec.mul_(torch.arange(1, 25).unsqueeze(1))  # Of any length, not only unit rows.
    sae.W_dec.grad = gradient.clone()
    sae.remove_parallel_gradient()
    w, g = sae.W_dec.detach().double().numpy(), gradient.double().numpy()
    along = (g * w).sum(1, keepdims=True) / (w * w).sum(1, keepdims=True)
    np.testing.assert_allclose(sae.W_dec.grad, g - along * w, atol=1e-5)
    np.testing.assert_allclose((sae.W_dec.grad.double().numpy() * w).sum(1), 0, atol=1e-4)


def test_normalised_decoder_keeps_directions(make):
    sae = make("relu", decoder_init_norm=0.1)
    directions = sae.W_dec.detach() / 0.1
    with torch.no_grad():
        sae.W_dec[3] = 0
    sae.normalise_decoder()
    torch.testing.assert_close(sae.W_dec[4:], directions[4:])
    assert torch.equal(sae.W_dec[3], torch.zeros(8))


# -- Storing, for every architecture ---------------------------------------------------------------


@every_kind
def test_saved_and_loaded_is_the_same(make, new, rows, kind):
    sae, x = make(kind), rows(40)
    config, tensors = sae.config(), sae.tensors()
    if "W_enc" in tensors:
        assert tensors["W_enc"].shape == (8, 24) and tensors["W_enc"].is_contiguous()
        assert torch.equal(tensors["W_enc"], sae.W_enc)
    assert config["type"] == kind and config["d_sae"] == 24 and config["expansion"] is None
    other = SAES.build(config, d_in=8)
    other.load_tensors({name: tensor.clone() for name, tensor in tensors.items()})
    assert other.config() == config
    assert torch.equal(other(x).x_hat, sae(x).x_hat)
    state = TrainState(0.5)
    assert torch.equal(other.loss(x, state).total, sae.loss(x, state).total)


@every_kind
def test_config_keeps_every_option_of_the_yaml(make, kind):
    assert make(kind).config().keys() == preset("sae", kind).keys()


@every_kind
def test_foreign_tensors_are_refused_before_anything_changes(make, kind):
    sae = make(kind)
    good = {name: tensor.clone() for name, tensor in sae.tensors().items()}
    other = {name: tensor + 1 for name, tensor in good.items()}
    renamed = {("W_enc_rows" if k == "W_enc" else k): v for k, v in other.items()}
    bias = sae.stored_names.get("b_enc", "b_enc")
    cases = [
        ({**other, "surplus": torch.zeros(3)}, "has a surplus tensor 'surplus'"),
        ({**other, "b_dec": torch.zeros(9)}, r"b_dec has shape \(9,\), expected \(8,\)"),
    ]
    if "W_enc" in good:  # Else it has no encoder of its own.
        turned = {**other, "W_enc": other["W_enc"].T}
        cases += [
            ({k: v for k, v in other.items() if k != bias}, f"lacks tensor '{bias}'"),
            (turned, r"W_enc has shape \(24, 8\), expected \(8, 24\)"),
            (renamed, f"checkpoint of type '{kind}' lacks tensor 'W_enc'"),
        ]
    for wrong, message in cases:
        with pytest.raises(StoreError, match=message):
            sae.load_tensors(wrong)
        for name, tensor in sae.tensors().items():
            assert torch.equal(tensor, good[name]), name


def test_stats_of_no_activation_leave_a_finite_scale(new):
    sae = new("relu", 4, 8)
    nothing = ActivationStats(torch.zeros(4), 0.0, 0.0, torch.zeros(3, 4))
    for scaling in ("sqrt_d", "unit_mean_square"):
        sae.input_scaling = scaling
        sae.set_input_scale(nothing)
        assert sae.input_scale.isfinite()
