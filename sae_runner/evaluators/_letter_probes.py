"""Probes for 26 letters: on activations, on latents with few of them, and how many a letter needs.

After SAEBench's absorption evaluation. A multi-probe is 26 logistic regressions trained side by
side by Adam, its rate falling from 1e-2 to 1e-5 exponentially over the epochs, from zero, on the
mean cross-entropy with positives weighted n_neg / n_pos, plus l1 · Σ|w| averaged over letters.
Batches are of 4,096 words, smaller where these would be fewer than ten: a small vocabulary takes as
many steps as a large one.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse
from torch import Tensor

from sae_runner.evaluators._first_letter import LETTERS

FIRST_RATE, LAST_RATE, BATCH, FEWEST_BATCHES = 1e-2, 1e-5, 4096, 10
N_EPOCHS, N_SPARSE_EPOCHS, SPARSE_L1 = 100, 50, 0.01
MOST_SPLITS = 10
GAIN = 0.03
"""What one latent more must add to F1 to count as a part of the letter's feature."""
Values = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class LetterProbes(NamedTuple):
    """One direction and threshold for each letter."""

    w: npt.NDArray[np.float64]
    """[26, m]"""
    b: npt.NDArray[np.float64]

    def scores(self, x: Any) -> Values:
        """[n, 26]: positive where a letter is said to come first."""
        return np.asarray(x @ self.w.T + self.b)


def fit_letters(x: Any, letter: Ints, *, n_epochs: int, l1: float, seed: int) -> LetterProbes:
    """A multi-probe on the rows of a dense array or of a SciPy array in CSR form."""
    y = torch.from_numpy(letter[:, None] == np.arange(len(LETTERS))).float()
    n, n_true = len(y), y.sum(0)
    weight = torch.where(n_true > 0, (n - n_true) / n_true.clamp_min(1), 1.0)
    is_sparse = sparse.issparse(x)
    dense = torch.zeros(0) if is_sparse else torch.from_numpy(x).float()
    with torch.enable_grad():
        w = torch.zeros(x.shape[1], len(LETTERS), requires_grad=True)
        b = torch.zeros(len(LETTERS), requires_grad=True)
        adam = torch.optim.Adam([w, b], lr=FIRST_RATE)
        decay = (LAST_RATE / FIRST_RATE) ** (1 / n_epochs)
        schedule = torch.optim.lr_scheduler.ExponentialLR(adam, decay)
        generator = torch.Generator().manual_seed(seed)
        size = max(1, min(BATCH, n // FEWEST_BATCHES))
        for _ in range(n_epochs):
            for chosen in torch.split(torch.randperm(n, generator=generator), size):
                rows = _tensor(x[chosen.numpy()]) if is_sparse else dense[chosen]
                answers = y[chosen]
                logits = (torch.sparse.mm(rows, w) if rows.is_sparse else rows @ w) + b
                loss = torch.nn.functional.binary_cross_entropy_with_logits(
                    logits, answers, pos_weight=weight
                )
                if l1:
                    loss = loss + l1 * w.abs().sum(0).mean()
                adam.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                adam.step()
            schedule.step()
    return LetterProbes(w.detach().double().numpy().T, b.detach().double().numpy())


def _tensor(rows: Any) -> Tensor:
    """Rows in CSR form as PyTorch multiplies them."""
    coo = rows.tocoo()
    places = torch.from_numpy(np.stack([coo.row, coo.col]).astype(np.int64))
    return torch.sparse_coo_tensor(
        places, torch.from_numpy(coo.data).float(), coo.shape, check_invariants=False
    ).coalesce()


def f1_of(said: npt.NDArray[np.bool_], true: npt.NDArray[np.bool_]) -> float:
    """2 · hits / (said + true); 0 where neither is ever so."""
    return float(2 * (said & true).sum() / max(said.sum() + true.sum(), 1))


class Splits(NamedTuple):
    """The latents that together are a letter's feature."""

    latents: Ints
    f1: list[float]
    """On the test words, of sparse probes on 1, 2, … latents."""


def splits_of(
    weights: Values, train: Any, y: npt.NDArray[np.bool_], test: Any, y_test: npt.NDArray[np.bool_]
) -> Splits:
    """As many of the letter's strongest latents as each add `GAIN` to F1.

    Args:
        weights: of each latent in the L1-regularised probe; only positive ones count.
        train: latents of the train words, CSR.
        y: whether each begins with the letter.
        test: latents of the test words.
        y_test: likewise.
    """
    from sklearn.linear_model import LogisticRegression

    order = np.argsort(-weights, kind="stable")[:MOST_SPLITS]
    order = order[weights[order] > 0]
    here, there, f1 = train[:, order].toarray(), test[:, order].toarray(), []
    for k in range(1, len(order) + 1):
        model = LogisticRegression(max_iter=500, class_weight="balanced").fit(here[:, :k], y)
        f1.append(f1_of(np.asarray(model.predict(there[:, :k])), y_test))
    return Splits(order[: n_split(f1)], f1)


def n_split(f1: list[float]) -> int:
    """How many latents are taken: one more as long as it adds more than `GAIN`."""
    n = min(1, len(f1))
    while 0 < n < len(f1) and f1[n] > f1[n - 1] + GAIN:
        n += 1
    return n
