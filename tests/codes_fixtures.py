"""Codes from dense latents, for what reads them."""

import numpy as np
import torch
from sae_fixtures import build

from sae_runner.evaluators._codes import Codes
from sae_runner.evaluators._collecting import CodesCollector
from sae_runner.evaluators.base import EvalContext, Rows
from sae_runner.saes.base import Latents


def codes_of(dense, n_tokens=1, *, ids=None, position=None, batch=10**9, order_seed=None) -> Codes:
    """Codes of latents [n_examples · n_tokens, d_sae], fed in batches in some order."""
    dense = torch.as_tensor(dense, dtype=torch.float32)
    n = len(dense)
    ids = torch.arange(n // n_tokens) if ids is None else torch.as_tensor(ids)
    ids = ids.repeat_interleave(n_tokens)
    position = torch.arange(n) % n_tokens if position is None else torch.as_tensor(position)
    order = torch.arange(n)
    if order_seed is not None:
        order = torch.from_numpy(np.random.default_rng(order_seed).permutation(n))
    collector = CodesCollector(2**40, 0)
    for part in order.split(batch):
        x = torch.zeros(len(part), 1)
        latents = Latents.from_dense(dense[part])
        collector.add(Rows(x, latents, x, ids[part], position[part], None))
    return collector.finish()


def context_of(codes: Codes, **options) -> EvalContext:
    """What an evaluator that reads codes is started with; its SAE is any."""
    given = {"sae": build("topk", 2, max(codes.d_sae, 8)), "seed": 0, **options}
    return EvalContext(
        n_rows=len(codes), example_ids=codes.example_ids.numpy(), codes=lambda: codes, **given
    )


def bare(base: type, **attributes):
    """An instance of an abstract class, of which a test needs a part."""
    stubs = {name: None for name in base.__abstractmethods__}
    return object.__new__(type(base.__name__, (base,), {**stubs, **attributes}))
