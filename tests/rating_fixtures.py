"""A rating pack of made-up rows of texts or images, and answers to it."""

import json
import re

import numpy as np
import torch
from codes_fixtures import bare, codes_of
from PIL import Image
from sae_fixtures import build

from sae_runner.config import preset
from sae_runner.data.base import Dataset, Example
from sae_runner.evaluators import EVALUATORS
from sae_runner.evaluators._responses import SCORES, TOTAL
from sae_runner.evaluators.base import EvalContext, Rows, Setting
from sae_runner.models._text import ReadsTokens
from sae_runner.models.base import Inputs, Model, SiteInfo
from sae_runner.saes.base import Latents
from sae_runner.site import TokenSelection

CFG = preset("evaluators", "human")["human"]
SMALL = {"n_latents": 8, "n_neurons": 4, "n_directions": 3, "n_untrained": 4, "per_interval": 2}
N, T, D, D_SAE = 60, 3, 6, 24
TEXT = SiteInfo("s", "m", D, "tokens", None)
IMAGE = SiteInfo("s", "m", D, "tokens", T, n_prefix=1, has_cls=True, grid=(1, 2))
SOURCES = ("latent", "neuron", "direction", "untrained")


class Words(Dataset):
    modality, name = "text", "words"

    def ids(self, split):
        raise NotImplementedError

    fingerprint = ids

    def load(self, ids):
        return [Example(i, np.arange(T) + T * i) for i in ids]


class Dots(Words):
    modality = "image"

    def load(self, ids):
        return [Example(i, Image.new("L", (8, 8), int(i))) for i in ids]


class Reader(Model, ReadsTokens):
    filler = 0

    def pieces(self, tokens):
        return [f" w{t}" for t in tokens]

    def token_rows(self, rows):
        raise NotImplementedError

    def prepare(self, examples):
        tokens = torch.stack([torch.from_numpy(e.value) for e in examples])
        return Inputs(torch.tensor([e.id for e in examples]), {"tokens": tokens})


def rows_of(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N * T, D, generator=generator)
    f = torch.rand(N * T, D_SAE, generator=generator)
    f[f < torch.linspace(0.3, 0.98, D_SAE)] = 0
    return x, f


def setting_of(image=False, modality=None):
    dataset = Dots() if image else Words()
    dataset.modality = modality or dataset.modality
    model = bare(Reader)
    return Setting(dataset, lambda: model, IMAGE if image else TEXT, TokenSelection("all"))


def measured(*, image=False, order=None, batch=1000, seed=0, folder=None, **options):
    """Findings of the evaluator on made-up rows of texts or images."""
    evaluator = EVALUATORS.build({**CFG, **SMALL, **options})
    setting, (x, f) = setting_of(image), rows_of()
    evaluator.check(setting)
    ids, place = torch.arange(N).repeat_interleave(T), torch.arange(N * T) % T

    def rows(which):
        return Rows(
            x[which], Latents.from_dense(f[which]), x[which], ids[which], place[which], None
        )

    codes = codes_of(f, T)
    context = EvalContext(
        build("topk", D, D_SAE), N * T, np.arange(N), seed, setting=setting, folder=folder,
        dataset=lambda: setting.dataset, model=setting.shapes, codes=lambda: codes,
        rows=lambda split, n: iter([rows(torch.arange(N * T))]),
    )  # fmt: skip
    evaluator.start(context)
    order = torch.arange(N * T) if order is None else order
    for part in order.split(batch):
        evaluator.update(rows(part))
    findings = evaluator.finish()
    return findings


def data_of(findings):
    page = findings.texts["pack.html"]
    return json.loads(re.search(r'id="pack">(.*?)</script>', page, re.DOTALL)[1])


def answer(data, rater, turn, total=0, **changes):
    scores = dict.fromkeys(SCORES)
    for name in data["fields"]:
        scores[name] = min(total, SCORES[name])
        total -= scores[name] if name in TOTAL else 0
    item, repeat = turn
    return {"pack": data["pack"], "rater": rater, "item": item, "repeat": repeat, **scores,
            "interpretation": "x", "seconds": 1.5, **changes}  # fmt: skip


def written(path, responses):
    path.write_text("".join(json.dumps(r) + "\n" for r in responses))
    return str(path)


def turns_of(data):
    return [(rater, turn) for rater, its in data["raters"].items() for turn in its["turns"]]
