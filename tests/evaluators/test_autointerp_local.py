"""A local language model that is asked in this process: a random one, which says nothing useful."""

import pytest
import torch
from gram_host import measured

from sae_runner.config import preset
from sae_runner.errors import ConfigError
from sae_runner.evaluators._explainers._endpoint import Unanswered
from sae_runner.evaluators._explainers._local import Local, identity_of
from sae_runner.models._pretrained import quiet

CFG = preset("evaluators", "autointerp_lm")["autointerp_lm"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("local")
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(["a unit of a network"], 300, special_tokens=["<end>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<end>")
    tokenizer.save_pretrained(path)
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=len(tokenizer), n_positions=4096, n_embd=8, n_layer=1, n_head=1
        )
        GPT2LMHeadModel(config).save_pretrained(path)
    return path


def test_answers_are_greedy(folder):
    local = Local(str(folder), "cpu")
    ids = local.tokenizer("say", return_tensors="pt")["input_ids"]
    wanted = []
    with torch.no_grad():
        for _ in range(6):
            token = local.network(ids).logits[0, -1].argmax()
            wanted.append(int(token))
            ids = torch.cat([ids, token.view(1, 1)], dim=1)
    assert local.complete("say", 6) == local.tokenizer.decode(wanted, skip_special_tokens=True)


def test_a_chat_template_is_used(folder):
    local = Local(str(folder), "cpu")
    plain = local.complete("<say> say", 6)
    local.tokenizer.chat_template = "{% for m in messages %}<say> {{ m.content }}{% endfor %}"
    assert local.complete("say", 6) == plain


def test_what_is_too_long_or_stopped_stays_unanswered(folder):
    local = Local(str(folder), "cpu")
    with pytest.raises(Unanswered, match="too long for the model"):
        local.complete("é" * 3000, 5)
    local.ended.set()
    with pytest.raises(Unanswered, match="stopped"):
        local.complete("a", 5)


def test_a_model_that_says_nothing_useful_leaves_latents_without_a_score(folder, tmp_path):
    backend = {**CFG["backend"], "local": str(folder)}
    findings, _ = measured({**CFG, "backend": backend}, folder=tmp_path, n_latents=2)
    assert findings.metrics["autointerp"]["n_scored"] == 0
    assert findings.incomplete.startswith("2 of 2 latents are without a score")


def test_folders_are_told_apart_and_must_be_a_model(folder, tmp_path):
    before = identity_of(str(folder))
    (folder / "extra.txt").write_text("x")
    assert identity_of(str(folder)) != before
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"backend\.local=.*: "):
        Local(str(tmp_path), "cpu")
    with pytest.raises(ConfigError, match="has no config"):
        identity_of(str(tmp_path.parent))
