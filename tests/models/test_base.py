import copy
import threading
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sae_runner.data.base import Example
from sae_runner.errors import ConfigError
from sae_runner.models.base import HookedModel, Inputs, Tap, labels_of, weights_hash

# -- Taps ----------------------------------------------------------------------------------------

N, T, D = 2, 6, 4
X = torch.arange(float(N * T * D)).view(N, T, D)

# The same [n, tokens, d] in every layout that a host may keep it in.
LAYOUTS = {
    "NLD": X,
    "LND": X.permute(1, 0, 2),
    "NCHW": X.permute(0, 2, 1).reshape(N, D, 2, 3),
    "NHWC": X.reshape(N, 2, 3, D),
    "NLHD": X.reshape(N, T, 2, 2),
    "ND": X[:, 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("columns", [None, (1, 3)])
@pytest.mark.parametrize("wrap", ["tensor", "tuple", "list", "named"])
def test_every_layout_is_read_as_tokens_and_written_back(layout, columns, wrap):
    value: Any = LAYOUTS[layout].contiguous()
    other = torch.zeros(3)
    item = None
    if wrap != "tensor":
        item = 1
        made = {"tuple": tuple, "list": list, "named": namedtuple("Out", "a b")._make}[wrap]
        value = made([other, value])
    tap = Tap("m", item=item, layout=layout, columns=columns)
    whole = X[:, :1] if layout == "ND" else X
    part = whole if columns is None else whole[..., 1:3]
    assert torch.equal(tap.read(value), part)
    new = tap.write(value, -part)
    expected = whole.clone()
    expected[..., slice(*(columns or (0, D)))] *= -1
    assert torch.equal(Tap("m", item=item, layout=layout).read(new), expected)
    assert type(new) is type(value)
    if wrap != "tensor":
        assert new[0] is other
    else:
        assert new.shape == value.shape


def test_a_map_of_another_size_is_no_place_for_the_edit():
    with pytest.raises(RuntimeError, match="shape"):
        Tap("m", layout="NCHW").write(torch.zeros(2, 4, 5, 5), X)


def test_a_module_that_gives_no_tensor_is_named():
    with pytest.raises(TypeError, match="pool gives a dict, not a tensor"):
        Tap("pool").read({"x": X})


# -- A host, written by hand ---------------------------------------------------------------------


class Block(nn.Module):
    """x + tanh(norm(x) W): the skip and the norm read the same tensor."""

    def __init__(self, seed: int, form: str) -> None:
        super().__init__()
        self.norm, self.linear, self.form = nn.Identity(), nn.Linear(D, D), form
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.linear.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 2
        self.n_calls = 0

    def forward(self, hidden: Tensor) -> Any:
        self.n_calls += 1
        x = hidden + torch.tanh(self.linear(self.norm(hidden)))
        return (x, None) if self.form == "tuple" else x


class Network(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.embed = nn.Linear(3, D)
        self.embed.weight.data = torch.randn(D, 3, generator=torch.Generator().manual_seed(9))
        self.embed.bias.data.zero_()
        self.blocks = nn.ModuleList(Block(i, form) for i in range(4))
        self.unused = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(hidden=x) if self.form == "keywords" else block(x)
            x = x[0] if self.form == "tuple" else x
        return x.mean(1)


class Host(HookedModel):
    modality = "text"

    def __init__(self, form: str = "plain") -> None:
        super().__init__()
        self.device = torch.device("cpu")
        self.network = Network(form)
        self.block_paths = [f"blocks.{i}" for i in range(4)]
        item = 0 if form == "tuple" else None
        self.table = {
            "embed": Tap("embed"),
            **{f"blocks.{i}.resid_pre": Tap(f"blocks.{i}", "input") for i in range(4)},
            **{f"blocks.{i}.resid_mid": Tap(f"blocks.{i}.norm", "input", in_place=True)
               for i in range(4)},
            **{f"blocks.{i}.resid_post": Tap(f"blocks.{i}", item=item) for i in range(4)},
            "blocks.1.linear.half": Tap("blocks.1.linear", columns=(0, 2)),
            "silent": Tap("unused"),
        }  # fmt: skip

    def forward(self, inputs: Inputs) -> Tensor:
        output: Tensor = self.network(inputs.tensors["x"])
        return output

    def taps(self) -> dict[str, Tap]:
        return self.table

    def probe(self, n: int) -> Inputs:
        return Inputs(torch.arange(n), {"x": torch.zeros(n, 5, 3)})

    def prepare(self, examples: Any) -> Inputs:
        raise NotImplementedError

    def fingerprint(self) -> str:
        return weights_hash(self.network)

    def describe(self) -> dict[str, Any]:
        return {}

    def calls(self) -> list[int]:
        return [block.n_calls for block in self.network.blocks]

    def n_hooks(self) -> int:
        return sum(
            len(module._forward_hooks) + len(module._forward_pre_hooks)
            for module in self.network.modules()
        )


FORMS = ["plain", "keywords", "tuple"]


@pytest.fixture(params=FORMS)
def host(request) -> Host:
    return Host(request.param)


def batch(n: int = 2, seed: int = 0) -> Inputs:
    x = torch.randn(n, 5, 3, generator=torch.Generator().manual_seed(seed))
    return Inputs(torch.arange(n), {"x": x})


def residuals(host: Host, inputs: Inputs) -> list[Tensor]:
    """The residual stream before block 0, after block 0, …, by hand."""
    found = [host.network.embed(inputs.tensors["x"])]
    for block in host.network.blocks:
        found.append(found[-1] + torch.tanh(block.linear(found[-1])))
    return found


# -- Sites ---------------------------------------------------------------------------------------


def test_sites_are_what_a_forward_pass_shows(host):
    sites = host.sites()
    assert list(sites) == [name for name in host.table if name != "silent"]
    assert (sites["embed"].d, sites["embed"].module, sites["embed"].kind) == (D, "embed", "tokens")
    assert sites["blocks.1.linear.half"].d == 2 and sites["embed"].n_tokens is None
    assert host.sites() is sites and host.n_hooks() == 0


def test_a_first_axis_that_is_not_the_batch_is_refused():
    host = Host()
    host.table["embed"] = Tap("embed", layout="LND")
    with pytest.raises(
        ConfigError, match=r"site 'embed' \(embed\): axis 0 .* not the batch: \(5, 3"
    ):
        host.sites()
    assert host.n_hooks() == 0
    with pytest.raises(ConfigError, match="site 'embed': 5 rows for 2 examples"):
        host.record(batch(), ["embed"])


def test_a_module_that_is_not_there_is_named_and_leaves_no_hook():
    host = Host()
    host.table["blocks.3.resid_post"] = Tap("block.3")
    with pytest.raises(ConfigError, match=r"no module 'block\.3'\. Did you mean 'blocks\.3'"):
        host.record(batch(), ["embed", "blocks.3.resid_post"])
    assert host.n_hooks() == 0


# -- Recording -----------------------------------------------------------------------------------


def test_recordings_are_the_networks_own_numbers(host):
    inputs = batch()
    expected = residuals(host, inputs)
    wanted = ["blocks.2.resid_post", "embed", "blocks.1.resid_pre", "blocks.3.resid_mid"]
    found = host.record(inputs, wanted)
    assert list(found) == wanted
    for name, i in zip(wanted, (3, 0, 1, 3), strict=True):
        torch.testing.assert_close(found[name], expected[i])
    half = host.record(inputs, ["blocks.1.linear.half"])["blocks.1.linear.half"]
    torch.testing.assert_close(half, host.network.blocks[1].linear(expected[1])[..., :2])
    assert host.n_hooks() == 0 and host.record(inputs, []) == {}


def test_nothing_after_the_last_site_runs(host):
    host.record(batch(), ["blocks.1.resid_post", "embed"])
    assert host.calls() == [1, 1, 0, 0]
    host.record(batch(), ["blocks.2.resid_pre"])
    assert host.calls() == [2, 2, 0, 0]


def test_gradients_flow_from_a_recording_when_they_are_enabled(host):
    x = host.record(batch(), ["blocks.1.resid_post"])["blocks.1.resid_post"]
    x.sum().backward()
    grads = [block.linear.weight.grad for block in host.network.blocks]
    assert grads[0].abs().sum() > 0 and grads[1].abs().sum() > 0 and grads[2] is None
    with torch.no_grad():
        assert not host.record(batch(), ["embed"])["embed"].requires_grad


def test_unknown_and_silent_sites_are_refused(host):
    with pytest.raises(ConfigError, match=r"no site 'blocks\.1\.resid'.*resid_p"):
        host.record(batch(), ["blocks.1.resid"])
    with pytest.raises(ConfigError, match="site 'silent': its module never ran"):
        host.record(batch(), ["silent"])
    with pytest.raises(ConfigError, match="no site 'x'"):
        host.splice(batch(), {"x": lambda x: x})
    assert host.n_hooks() == 0


def test_hooks_go_when_the_network_fails(host):
    def fail(_: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        host.splice(batch(), {"blocks.0.resid_post": fail})
    assert host.n_hooks() == 0


def test_one_thread_at_a_time_has_its_hooks_in_the_network():
    host, found = Host(), {}

    def work(seed: int) -> None:
        inputs = batch(seed=seed)
        for _ in range(20):
            x = host.record(inputs, ["blocks.3.resid_post"])["blocks.3.resid_post"]
            found.setdefault(seed, []).append(x.detach())

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, recorded in found.items():
        expected = residuals(host, batch(seed=seed))[4]
        assert len(recorded) == 20
        assert all(torch.allclose(x, expected, atol=1e-6) for x in recorded)


# -- Splicing ------------------------------------------------------------------------------------


def test_an_edit_that_changes_nothing_changes_nothing(host):
    inputs = batch()
    sites = {name: (lambda x: x) for name in host.table if name != "silent"}
    assert torch.equal(host.splice(inputs, sites), host.forward(inputs))
    assert torch.equal(host.splice(inputs, {}), host.forward(inputs))


@pytest.mark.parametrize("site", ["blocks.1.resid_post", "blocks.2.resid_pre"])
def test_what_comes_after_an_edit_sees_it(host, site):
    inputs = batch()
    x = -2 * residuals(host, inputs)[2] + 1
    for block in list(host.network.blocks)[2:]:
        x = x + torch.tanh(block.linear(x))
    torch.testing.assert_close(host.splice(inputs, {site: lambda x: -2 * x + 1}), x.mean(1))


def test_an_edit_in_the_middle_of_a_block_reaches_the_skip_too(host):
    inputs = batch()
    x = 3 * residuals(host, inputs)[3]
    x = x + torch.tanh(host.network.blocks[3].linear(x))
    edited = host.splice(inputs, {"blocks.3.resid_mid": lambda x: 3 * x})
    torch.testing.assert_close(edited, x.mean(1))


def test_edits_at_several_sites_see_each_others_effect(host):
    inputs, seen = batch(), {}

    def double(x: Tensor) -> Tensor:
        return 2 * x

    def keep(x: Tensor) -> Tensor:
        seen["x"] = x
        return torch.zeros_like(x)

    output = host.splice(inputs, {"blocks.0.resid_post": double, "blocks.1.resid_post": keep})
    x = 2 * residuals(host, inputs)[1]
    torch.testing.assert_close(seen["x"], x + torch.tanh(host.network.blocks[1].linear(x)))
    x = torch.zeros_like(x)
    for block in list(host.network.blocks)[2:]:
        x = x + torch.tanh(block.linear(x))
    torch.testing.assert_close(output, x.mean(1))


def test_part_of_the_columns_is_edited_alone(host):
    inputs = batch()
    x = residuals(host, inputs)[1]
    inner = host.network.blocks[1].linear(x)
    inner = torch.cat([torch.zeros_like(inner[..., :2]), inner[..., 2:]], -1)
    x = x + torch.tanh(inner)
    for block in list(host.network.blocks)[2:]:
        x = x + torch.tanh(block.linear(x))
    edited = host.splice(inputs, {"blocks.1.linear.half": torch.zeros_like})
    torch.testing.assert_close(edited, x.mean(1))


def test_only_chosen_positions_are_edited(host):
    inputs = batch()
    positions = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    seen = {}

    def edit(x: Tensor) -> Tensor:
        return torch.full_like(x, 7.0)

    def keep(x: Tensor) -> Tensor:
        seen["x"] = x
        return x

    edits = {"blocks.1.resid_post": edit, "blocks.2.resid_pre": keep}
    output = host.splice(inputs, edits, positions)
    plain = residuals(host, inputs)[2]
    assert (seen["x"][0, [0, 3]] == 7).all()
    assert torch.equal(seen["x"][~positions], plain[~positions])
    torch.testing.assert_close(output[1], host.forward(inputs)[1])


def test_an_edit_may_compute_in_another_precision(host):
    inputs = batch()
    edited = host.splice(inputs, {"blocks.1.resid_post": lambda x: x.double()})
    assert torch.equal(edited, host.forward(inputs))


def test_gradients_flow_through_an_edit(host):
    shift = torch.zeros(D, requires_grad=True)
    host.splice(batch(), {"blocks.2.resid_post": lambda x: x + shift}).sum().backward()
    assert shift.grad is not None and (shift.grad != 0).all()


# -- Going on from a site ------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["blocks.2.resid_post", "blocks.3.resid_pre"])
def test_what_lies_before_is_not_computed_again(site):
    host, inputs = Host(), batch()
    whole, x = host.forward(inputs), residuals(host, inputs)[3]
    before = host.calls()
    torch.testing.assert_close(host.resume_from(site, x, inputs), whole)
    assert [b - a for a, b in zip(before, host.calls(), strict=True)] == [0, 0, 0, 1]
    # Nothing is left behind: the network runs whole again.
    before = host.calls()
    assert torch.equal(host.forward(inputs), whole) and host.n_hooks() == 0
    assert [b - a for a, b in zip(before, host.calls(), strict=True)] == [1, 1, 1, 1]


@pytest.mark.parametrize("form", ["keywords", "tuple"])
def test_hosts_of_other_forms_go_on_too(form):
    host, inputs = Host(form), batch()
    x = residuals(host, inputs)[3]
    for site in ("blocks.2.resid_post", "blocks.3.resid_pre"):
        before = host.calls()
        found = host.resume_from(site, x, inputs)
        ran = [b - a for a, b in zip(before, host.calls(), strict=True)]
        assert ran == ([1, 1, 1, 1] if form == "tuple" else [0, 0, 0, 1])
        torch.testing.assert_close(found, host.forward(inputs))


@pytest.mark.parametrize("site", ["blocks.2.resid_pre", "blocks.2.resid_mid", "embed"])
def test_elsewhere_the_whole_network_runs_with_the_site_replaced(host, site):
    inputs = batch()
    x = residuals(host, inputs)[0 if site == "embed" else 2]
    torch.testing.assert_close(host.resume_from(site, x, inputs), host.forward(inputs))
    changed = host.resume_from(site, x + 1, inputs)
    torch.testing.assert_close(changed, host.splice(inputs, {site: lambda x: x + 1}))


def test_one_input_goes_on_from_many_edits(host):
    inputs = batch(3)
    x = residuals(host, inputs)[2]
    edits = torch.stack([x, x + 1, -x, 0 * x], 1)  # [example, edit, tokens, d]
    found = host.resume_from("blocks.1.resid_post", edits.flatten(0, 1), inputs).view(3, 4, D)
    for i in range(4):
        alone = host.splice(inputs, {"blocks.1.resid_post": lambda _, i=i: edits[:, i]})
        torch.testing.assert_close(found[:, i], alone)
    with pytest.raises(ValueError, match="4 rows are no multiple of the 3"):
        host.resume_from("blocks.1.resid_post", torch.zeros(4, 5, D), inputs)


def test_gradients_reach_what_it_goes_on_from(host):
    inputs = batch()
    x = residuals(host, inputs)[2].detach().requires_grad_()
    host.resume_from("blocks.1.resid_post", x, inputs).sum().backward()
    assert x.grad is not None and (x.grad != 0).all()


def test_a_forward_that_a_library_put_there_comes_back():
    host, inputs = Host(), batch()
    block = host.network.blocks[0]
    block.forward = own = lambda hidden: hidden * 2
    host.resume_from("blocks.2.resid_post", residuals(host, inputs)[3], inputs)
    assert vars(block)["forward"] is own
    assert "forward" not in vars(host.network.blocks[1])


# -- Inputs and hashes ---------------------------------------------------------------------------


def test_every_tensor_of_a_batch_is_mapped():
    inputs = Inputs(
        torch.arange(2), {"x": torch.ones(2, 3), "y": torch.zeros(2)},
        attended=torch.ones(2, 3, dtype=torch.bool), labels=torch.tensor([4, 5]),
    )  # fmt: skip
    twice = inputs.map(lambda tensor: tensor.repeat_interleave(2, 0))
    assert len(twice) == 4 and twice.ids.tolist() == [0, 0, 1, 1]
    assert twice.tensors["x"].shape == (4, 3) and twice.tensors["y"].shape == (4,)
    assert twice.labels.tolist() == [4, 4, 5, 5] and twice.special is None
    assert len(inputs) == 2 and inputs.to("meta").tensors["x"].device.type == "meta"


def test_an_example_without_a_label_has_minus_one_among_others_that_have_one():
    some = labels_of([Example(0, "a", 3), Example(1, "b"), Example(2, "c", 0)])
    assert some.tolist() == [3, -1, 0] and some.dtype == torch.int64
    assert labels_of([Example(0, "a"), Example(1, "b")]) is None


def test_a_hash_is_of_names_shapes_dtypes_numbers_and_facts():
    network = nn.Linear(2, 2)
    hashes = {weights_hash(network), weights_hash(network, "fact")}
    assert weights_hash(copy.deepcopy(network)) in hashes
    for change in (
        lambda n: n.weight.data.view(-1)[3].add_(1e-6),
        lambda n: n.double(),
        lambda n: setattr(n, "weight", nn.Parameter(n.weight.data.view(1, 4))),
        lambda n: n.register_buffer("more", torch.zeros(0)),
        lambda n: n.to("meta"),
    ):
        other = copy.deepcopy(network)
        change(other)
        hashes.add(weights_hash(other))
    assert len(hashes) == 7
    wrapped = nn.Sequential(network)
    assert weights_hash(wrapped) not in hashes
    assert weights_hash(nn.Linear(2, 2).to(torch.bfloat16)) != weights_hash(network)
