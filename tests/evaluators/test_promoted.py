import numpy as np
import pytest
import torch
from host_fixtures import SITE, VOCAB, Host, numpy_run
from rating_fixtures import Words

from sae_runner.evaluators._promoted import Outputs, names_of
from sae_runner.models._text import ReadsTokens, TextTower
from sae_runner.models.base import Inputs


class Speaking(Host, ReadsTokens):
    filler = 0

    def pieces(self, tokens):
        return [f"<{t}>" for t in tokens]

    def token_rows(self, rows):
        raise NotImplementedError


class Seeing(Host, TextTower):
    """An embedding of an input beside those of texts, which are columns of the identity."""

    output = "features"
    logit_scale, logit_bias = 3.0, 0.0

    def forward(self, inputs):
        return self.network(inputs.tensors["tokens"]).mean(1)[:, :4]

    def encode_text(self, texts):
        return torch.eye(4)[[int(text.rsplit(" ", 1)[1].rstrip(".")) for text in texts]]


def named(*labels):
    dataset = Words()
    dataset.label_names = labels or None
    return dataset


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


TOKENS = torch.tensor([[0, 3, 5, 2], [0, 1, 7, 7], [0, 9, 4, 1]])
POSITION, AMOUNTS = torch.tensor([1, 3, 2]), torch.tensor([0.5, 2.0, 1.0])
DIRECTION = torch.tensor([0.3, -1.0, 0.2, 0.7, 0.0, -0.4])


def expected_change(host, of=lambda logits: logits[np.arange(3), POSITION]):
    def more(x):
        x = x.copy()
        x[np.arange(3), POSITION] += (AMOUNTS[:, None] * DIRECTION[None]).numpy()
        return x

    clean, spliced = (numpy_run(host, TOKENS.numpy(), c)[0] for c in (lambda x: x, more))
    return (softmax(of(spliced)) - softmax(of(clean))).mean(0)


def promoted(host, dataset, n=VOCAB):
    inputs = Inputs(torch.arange(3), {"tokens": TOKENS})
    outputs = Outputs(host, dataset, host.sites()[SITE])
    return outputs.promoted(inputs, POSITION, DIRECTION, AMOUNTS, n)


def test_tokens_are_named_whose_probability_grows_most_at_the_place():
    host = Speaking()
    change = expected_change(host)
    order = np.argsort(-change)
    wanted = [f"<{i}>" for i in order if change[i] > 0]
    assert 2 < len(wanted) < VOCAB
    assert promoted(host, named()) == wanted
    assert promoted(host, named(), 2) == wanted[:2]


def test_classes_of_a_classifier_are_named():
    host = Host()
    host.output = "class_logits"
    change = expected_change(host, lambda logits: logits.mean(1))
    labels = [f"kind_{i}" for i in range(VOCAB)]
    wanted = [f"kind {i}" for i in np.argsort(-change) if change[i] > 0]
    assert promoted(host, named(*labels)) == wanted


def test_classes_of_a_dataset_are_named_by_the_text_tower():
    def similarities(logits):
        v = logits.mean(1)[:, :4]
        return 3.0 * v / np.linalg.norm(v, axis=1, keepdims=True)

    change = expected_change(Host(), similarities)
    wanted = [str(i) for i in np.argsort(-change) if change[i] > 0]
    assert 0 < len(wanted) < 4 and promoted(Seeing(), named("0", "1", "2", "3")) == wanted


@pytest.mark.parametrize("output", ["token_logits", "class_logits", "features"])
def test_outputs_without_names_are_known_as_such(output):
    host = Host()
    host.output = output
    assert Outputs(host, named(), host.sites()[SITE]).name is None


def test_a_row_of_a_whole_example_is_all_its_tokens():
    host = Speaking()
    outputs = Outputs(host, named(), host.sites()[SITE])
    inputs = Inputs(torch.arange(3), {"tokens": TOKENS})
    found = outputs.promoted(inputs, torch.full((3,), -1), DIRECTION, AMOUNTS, VOCAB)

    def more(x):
        return x + (AMOUNTS[:, None] * DIRECTION[None]).numpy()[:, None]

    clean, spliced = (numpy_run(host, TOKENS.numpy(), c)[0] for c in (lambda x: x, more))
    change = (softmax(spliced[:, -1]) - softmax(clean[:, -1])).mean(0)
    assert found == [f"<{i}>" for i in np.argsort(-change) if change[i] > 0]


def test_what_is_invisible_is_shown():
    assert names_of(["\n\n", " a", "\t"]) == ["↵↵", " a", "⇥"]
