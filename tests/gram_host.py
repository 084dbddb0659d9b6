"""A host whose latents are planted n-grams, for what explains latents of text."""

from dataclasses import replace

import numpy as np
import torch
from codes_fixtures import bare, codes_of, context_of
from evaluators.conftest import Given, assert_publishable

from sae_runner.data.base import Dataset, Example
from sae_runner.evaluators import EVALUATORS
from sae_runner.evaluators.base import Rows as Batch
from sae_runner.evaluators.base import Setting
from sae_runner.models._text import ReadsTokens
from sae_runner.models.base import Inputs, Model, SiteInfo
from sae_runner.saes.base import Latents
from sae_runner.site import TokenSelection

VOCAB, N_EXAMPLES, LENGTH, BOS, SEP, FILLER = 12, 400, 20, 12, 13, 14
SITE = SiteInfo("blocks.0.resid_post", "m", 45, "tokens", None)


class Grams(Model, ReadsTokens):
    """x_t = the one-hot tokens at t, t − 1 and, in an encoder, t + 1. BOS, perhaps SEP, around."""

    modality, device, filler, context = "text", torch.device("cpu"), FILLER, LENGTH + 2
    encoder, bos, n_runs = False, True, 0

    @property
    def prefix(self):
        return [BOS] if self.bos else []

    @property
    def suffix(self):
        return [SEP] if self.encoder else []

    def fingerprint(self):
        return "a host"

    def pieces(self, tokens):
        return [f" {t}" for t in tokens]

    def prepare(self, examples):
        bodies = [[0] if isinstance(e.value, str) else e.value for e in examples]
        return self.token_rows([[*self.prefix, *body, *self.suffix] for body in bodies])

    def token_rows(self, rows):
        assert all(len(row) <= self.context for row in rows)
        tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        attended = torch.zeros(tokens.shape, dtype=torch.bool)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], attended[i, : len(row)] = torch.tensor(row), True
        special = (tokens == BOS) | (tokens == SEP)
        return Inputs(torch.arange(len(rows)), {"tokens": tokens}, attended, special)

    def record(self, inputs, sites):
        self.n_runs += 1
        hot = torch.nn.functional.one_hot(inputs.tensors["tokens"], 15).float()
        hot = hot * inputs.attended.unsqueeze(2)
        before, after = torch.zeros_like(hot), torch.zeros_like(hot)
        before[:, 1:] = hot[:, :-1]
        after[:, :-1] = hot[:, 1:] * self.encoder
        return {SITE.name: torch.cat([hot, before, after], dim=2)}


class Planted(Given):
    """0: token 3; 1: 5 after 4; 2: 6 or 7, the latter weaker; 3: 2 before 8, in an encoder; 4: one
    of 0 to 5 after BOS; 5: dead."""

    def encode(self, x):
        hot, before, after = x.split(15, dim=1)
        return torch.stack([
            2 * hot[:, 3],
            (hot[:, 5] + before[:, 4] - 1).relu() * 3,
            hot[:, 6] + 0.25 * hot[:, 7],
            (hot[:, 2] + after[:, 8] - 1).relu(),
            hot[:, :6].sum(1) * before[:, BOS],
            torch.zeros(len(x)),
        ], dim=1)  # fmt: skip


class TwoFaced(Planted):
    """Latent 5 is token 9, and token 10 too."""

    def encode(self, x):
        latents = super().encode(x)
        latents[:, 5] = x[:, 9] + x[:, 10]
        return latents


class Rows(Dataset):
    modality, rows = "tokens", None

    def fingerprint(self):
        return str(hash(str(self.rows)))

    def load(self, ids):
        return [Example(int(i), self.rows[int(i)]) for i in ids]


def measured(
    cfg,
    *,
    folder=None,
    encoder=False,
    bos=True,
    n_latents=10,
    seed=0,
    batch=10**9,
    tokens="all",
    kind=Planted,
    vocabulary=range(VOCAB),
    weights="an SAE",
    **options,
):
    host = bare(Grams, encoder=encoder, bos=bos)
    rng = np.random.default_rng(0)
    rows = np.array(vocabulary)[rng.integers(0, len(vocabulary), (N_EXAMPLES, LENGTH))].tolist()
    inputs = host.prepare([Example(i, row) for i, row in enumerate(rows)])
    sae = kind(torch.ones(6, 45), 1.0)
    selection = TokenSelection("all", drop_positions=(0,))
    keep = selection.mask(SITE, inputs, inputs.tensors["tokens"].shape[1])
    example, position = keep.nonzero(as_tuple=True)
    x = host.record(inputs, [])[SITE.name][keep]
    latents = sae.encode(x)
    order = 7 if batch < 10**9 else None
    codes = codes_of(latents, ids=example, position=position, batch=batch, order_seed=order)
    dataset = bare(Rows, rows=rows)
    setting = Setting(
        dataset, lambda: host, SITE, replace(selection, tokens=tokens), weights=weights
    )
    evaluator = EVALUATORS.build(
        {**cfg, "n_silent": 10, "n_bootstrap": 50, "n_neurons": 0, **options}
    )
    evaluator.check(setting)
    context = context_of(
        codes, sae=sae, seed=seed, setting=setting, dataset=lambda: dataset,
        model=lambda: host, n_latents=n_latents, folder=folder,
    )  # fmt: skip
    evaluator.start(context)
    for at in torch.arange(len(x)).split(batch):
        of = example[at], position[at], None
        evaluator.update(Batch(x[at], Latents.from_dense(latents[at]), x[at], *of))
    findings = evaluator.finish()
    assert_publishable(findings)
    host.data, host.spent = dataset.fingerprint(), context.spent
    return findings, host


def of_latent(findings, latent):
    columns = findings.tables["latents"]
    at = columns["feature"].index(latent)
    return {name: column[at] for name, column in columns.items()}
