import numpy as np
import pytest
import torch
from codes_fixtures import bare, codes_of
from PIL import Image

from sae_runner.data.base import Dataset, Example, Unreadable
from sae_runner.errors import DataError
from sae_runner.evaluators._showing import Showing, grid_of, marked
from sae_runner.models._text import ReadsTokens
from sae_runner.models.base import Inputs, Model, SiteInfo

TEXT = SiteInfo("s", "m", 4, "tokens", None)
IMAGE = SiteInfo("s", "m", 4, "tokens", 5, n_prefix=1, has_cls=True, grid=(2, 2))


class Words(Dataset):
    modality = "tokens"
    lengths = (5, 3, 4)

    def ids(self, split):
        raise NotImplementedError

    def fingerprint(self):
        raise NotImplementedError

    def load(self, ids):
        if 99 in list(ids):
            return [Unreadable(99, "gone")]
        return [Example(i, np.arange(self.lengths[i]) + 10 * i) for i in ids]


class Reader(Model, ReadsTokens):
    filler = 0

    def pieces(self, tokens):
        return [f" {t}" for t in tokens]

    def token_rows(self, rows):
        raise NotImplementedError

    def prepare(self, examples):
        n = max(len(e.value) for e in examples)
        tokens, own = torch.zeros(len(examples), n, dtype=torch.int64), []
        for i, example in enumerate(examples):
            tokens[i, : len(example.value)] = torch.from_numpy(example.value)
            own.append([p < len(example.value) for p in range(n)])
        attended = torch.tensor(own)
        special = torch.zeros_like(attended)
        special[:, 0] = True
        ids = torch.tensor([e.id for e in examples])
        return Inputs(ids, {"tokens": tokens}, attended, special)


@pytest.fixture
def showing():
    """Rows are tokens 1 and on of three texts of 5, 3 and 4 tokens; one latent."""
    values = [[0.0, 2.0, 0.0, 1.0], [3.0, 0.5], [0.0, 0.0, 4.0]]
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor([4, 2, 3]))
    position = torch.tensor([1, 2, 3, 4, 1, 2, 1, 2, 3])
    dense = torch.tensor([v for row in values for v in row])[:, None]
    codes = codes_of(dense, ids=ids, position=position)
    return Showing(codes, Words(), bare(Reader), TEXT)


def test_a_window_of_tokens_has_its_activations(showing):
    first, second, third = showing.texts(0, [0, 1, 2], [2, 1, 3], 1)
    assert (first.example_id, first.begin, first.pieces) == (0, 1, [" 1", " 2", " 3"])
    assert first.acts.tolist() == [0, 2, 0] and first.read.all() and not first.special.any()
    assert second.pieces == [" 10", " 11", " 12"] and second.text == " 10 11 12"
    assert second.acts.tolist() == [0, 3, 0.5] and second.read.tolist() == [False, True, True]
    assert second.special.tolist() == [True, False, False]
    assert third.pieces == [" 22", " 23"] and third.acts.tolist() == [0, 4]
    assert [w.before.tolist() for w in (first, second, third)] == [[0], [], [20, 21]]


def test_a_window_is_cut_at_the_ends_of_the_text_and_not_at_those_of_the_batch(showing):
    whole, short = showing.texts(0, [0, 1], [2, 1], 100)
    assert len(whole.pieces) == 5 and len(short.pieces) == 3
    assert whole.acts.tolist() == [0, 0, 2, 0, 1]


def test_rows_of_whole_texts_show_their_beginning():
    codes = codes_of(torch.ones(3, 1), position=torch.full((3,), -1))
    (window,) = Showing(codes, Words(), bare(Reader), TEXT).texts(0, [0], [-1], 1)
    assert window.pieces == [" 0", " 1", " 2"] and not window.acts.any() and not window.read.any()


def test_marks_are_around_active_tokens_and_neighbours_share_them(showing):
    _, second, _ = showing.texts(0, [0, 1, 2], [2, 1, 3], 1)
    assert marked(second, 0.0) == " 10<< 11 12>>"
    assert marked(second, 0.9) == " 10<< 11>> 12"
    assert marked(second, 3.0) == second.text


def test_images_have_the_latent_on_the_grid_of_patches():
    class Pictures(Words):
        def load(self, ids):
            return [Example(i, Image.new("L", (8, 8), int(i))) for i in ids]

    dense = torch.tensor([[9.0], [1.0], [0.0], [2.0], [3.0]]).repeat(2, 1)
    codes = codes_of(dense, 5)
    (view,) = Showing(codes, Pictures(), bare(Reader), IMAGE).images(0, [1])
    assert view.example_id == 1 and view.image.mode == "RGB" and view.image.size == (8, 8)
    assert view.heat.tolist() == [[1, 0], [2, 3]]  # Without the class token.
    cls = codes_of(torch.ones(2, 1), position=torch.zeros(2, dtype=torch.int64))
    assert Showing(cls, Pictures(), bare(Reader), IMAGE).heat(0, 1) is None
    assert grid_of(TEXT) is None


def test_an_example_that_is_gone_is_named():
    codes = codes_of(torch.ones(1, 1), ids=[99])
    with pytest.raises(DataError, match="example 99 can no longer be read: gone"):
        Showing(codes, Words(), bare(Reader), TEXT).texts(0, [0], [0], 1)
