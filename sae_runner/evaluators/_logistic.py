"""Logistic probes: thousands on one number each, all at once, and one on all numbers.

A probe on one number z is p = σ(w z + b), found by Newton's method from w = b = 0 on

    mean of −y ln p − (1 − y) ln(1 − p)  +  ridge · w² / 2        (nats; z at sd 1 on the train set)

with the step halved while that rises. The zeros of a sparse column share one p, so that a step
costs what the non-zero entries do. A column of sd below 1e-8 is constant: its probe is the base
rate alone. Columns are taken some at a time, so that what a step needs beside them stays small.
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy import linalg, sparse
from scipy.special import expit
from torch import Tensor

Values = npt.NDArray[np.float64]
Labels = npt.NDArray[np.bool_]
N_STEPS, N_HALVINGS = 25, 20
GRADIENT = 1e-7
LEAST_SD = 1e-8
NEARLY_DENSE = 2 / 3
"""Above this share of non-zero entries an array takes less memory without its zeros left out."""
AT_ONCE = 2**21
"""Entries of the columns that are taken at a time."""
JITTER = 1e-10
"""Added to squared lengths, in units of their mean, so that a Cholesky factor exists."""


class Singles(NamedTuple):
    """One probe for each column, in the units of the column."""

    w: Values
    b: Values
    loss: Values
    """Mean loss on the train set, without the ridge."""
    constant: npt.NDArray[np.bool_]


def bce(logit: Values, y: Labels) -> float:
    """Mean binary cross-entropy in nats."""
    return float(np.mean(np.logaddexp(0, logit) - y * logit))


def entropy(y: Labels) -> float:
    """H(mean of y) in nats: the loss of knowing nothing but the base rate."""
    p = float(np.mean(y))
    return float(-sum(q * np.log(q) for q in (p, 1 - p) if q > 0))


def fit_singles(columns: Any, y: Labels, ridge: float) -> Singles:
    """A probe on every column of a SciPy array or of a dense one.

    Args:
        columns: [n, m].
        y: [n], of both classes.
        ridge: on the squared weight of the standardised column.
    """
    x = sparse.csc_array(columns) if sparse.issparse(columns) else columns
    n, m = x.shape
    ends = x.indptr[1:] if sparse.issparse(x) else n * np.arange(1, m + 1)
    parts = [_fit(x[:, begin:end], y, ridge) for begin, end in pieces(ends)]
    return Singles(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def pieces(ends: npt.NDArray[Any]) -> Iterator[tuple[int, int]]:
    """Begin and end of runs of columns with at most AT_ONCE entries, or of one with more.

    `ends` counts the entries up to each column, its own included.
    """
    begin = 0
    while begin < len(ends):
        before = int(ends[begin - 1]) if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, before + AT_ONCE, "right")))
        yield begin, end
        begin = end


def _fit(x: Any, y: Labels, ridge: float) -> Singles:
    m = x.shape[1]
    base = float(np.log(y.mean() / (1 - y.mean())))
    mean, sd = _mean_and_sd(x)
    varied = (sd >= LEAST_SD).nonzero()[0]
    found = Singles(np.zeros(m), np.full(m, base), np.full(m, entropy(y)), sd < LEAST_SD)
    if len(varied):
        kind = _Standardised if sparse.issparse(x) else _Dense
        standard = kind(x[:, varied], mean[varied], sd[varied], y)
        w, b, loss = _newton(standard, ridge)
        found.w[varied] = w / sd[varied]
        found.b[varied] = b - w * mean[varied] / sd[varied]
        found.loss[varied] = loss
    return found


def _mean_and_sd(x: Any) -> tuple[Values, Values]:
    """Of each column, in float64."""
    if not sparse.issparse(x):
        return x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
    n, m = x.shape
    mean, counts = np.asarray(x.sum(0)) / n, np.diff(x.indptr)
    of_entry = np.repeat(np.arange(m), counts)
    squares = np.bincount(of_entry, (x.data - mean[of_entry]) ** 2, m)
    return mean, np.sqrt((squares + (n - counts) * mean**2) / n)


class _Dense:
    """Columns at mean 0 and sd 1, one beside the other in memory."""

    def __init__(self, x: Any, mean: Values, sd: Values, y: Labels) -> None:
        self.n, self.m = x.shape
        z = np.ascontiguousarray(x.T, dtype=np.float64)
        self.z = torch.from_numpy((z - mean[:, None]) / sd[:, None])
        true = torch.from_numpy(y.astype(np.float64))
        self.n_true, self.z_true = float(true.sum()), (self.z @ true).numpy()

    def _logits(self, w: Values, b: Values) -> Tensor:
        bias, weight = torch.from_numpy(b)[:, None], torch.from_numpy(w)[:, None]
        return torch.addcmul(bias, weight, self.z)

    def loss(self, w: Values, b: Values) -> Values:
        """Mean cross-entropy of each column."""
        total = -torch.nn.functional.logsigmoid(self._logits(w, b).neg_()).sum(1).numpy()
        return np.asarray((total - w * self.z_true - b * self.n_true) / self.n)

    def derivatives(self, w: Values, b: Values) -> tuple[Values, ...]:
        """Of the mean loss: by w, by b, twice by w, by both, twice by b."""
        p = self._logits(w, b).sigmoid_()
        curve = p * (1 - p)
        along = curve * self.z
        sums = (
            torch.linalg.vecdot(p, self.z).numpy() - self.z_true,
            p.sum(1).numpy() - self.n_true,
            torch.linalg.vecdot(along, self.z).numpy(),
            along.sum(1).numpy(),
            curve.sum(1).numpy(),
        )
        return tuple(total / self.n for total in sums)


class _Standardised:
    """Sparse columns at mean 0 and sd 1: entries, and what all of their zeros have become."""

    def __init__(self, x: Any, mean: Values, sd: Values, y: Labels) -> None:
        self.n, self.m = x.shape
        counts = np.diff(x.indptr)
        self.column, self.starts = np.repeat(np.arange(self.m), counts), x.indptr[:-1]
        self.z, self.y = (x.data - mean[self.column]) / sd[self.column], y[x.indices]
        self.zero = -mean / sd
        self.n_zero = self.n - counts
        self.n_zero_true = int(y.sum()) - self._sums(self.y.astype(np.float64))

    def _sums(self, values: Values) -> Values:
        # Every column has an entry: one without any would be constant.
        return np.asarray(np.add.reduceat(values, self.starts))

    def loss(self, w: Values, b: Values) -> Values:
        """Mean cross-entropy of each column."""
        u, zero = w[self.column] * self.z + b[self.column], w * self.zero + b
        total = self._sums(np.logaddexp(0, u) - self.y * u)
        total += self.n_zero * np.logaddexp(0, zero) - self.n_zero_true * zero
        return np.asarray(total / self.n)

    def derivatives(self, w: Values, b: Values) -> tuple[Values, ...]:
        """Of the mean loss: by w, by b, twice by w, by both, twice by b."""
        p, zero = expit(w[self.column] * self.z + b[self.column]), expit(w * self.zero + b)
        off, zero_off = p - self.y, self.n_zero * zero - self.n_zero_true
        curve, zero_curve = p * (1 - p), self.n_zero * zero * (1 - zero)
        sums = (
            self._sums(off * self.z) + zero_off * self.zero,
            self._sums(off) + zero_off,
            self._sums(curve * self.z**2) + zero_curve * self.zero**2,
            self._sums(curve * self.z) + zero_curve * self.zero,
            self._sums(curve) + zero_curve,
        )
        return tuple(total / self.n for total in sums)


def _newton(x: _Standardised | _Dense, ridge: float) -> tuple[Values, Values, Values]:
    w, b = np.zeros(x.m), np.zeros(x.m)
    loss = x.loss(w, b)
    for _ in range(N_STEPS):
        by_w, by_b, ww, wb, bb = x.derivatives(w, b)
        by_w, ww, bb = by_w + ridge * w, ww + ridge + 1e-9, bb + 1e-9
        if max(np.abs(by_w).max(), np.abs(by_b).max()) < GRADIENT:
            break
        determinant = ww * bb - wb**2
        step = (bb * by_w - wb * by_b) / determinant, (ww * by_b - wb * by_w) / determinant
        size, objective = np.ones(x.m), loss + ridge * w**2 / 2
        for _ in range(N_HALVINGS + 1):
            new_w, new_b = w - size * step[0], b - size * step[1]
            loss = x.loss(new_w, new_b)
            rises = loss + ridge * new_w**2 / 2 > objective + 1e-13
            if not rises.any():
                break
            size[rises] /= 2
        w, b = new_w, new_b
    return w, b, loss


class Full(NamedTuple):
    """A logistic regression on all columns."""

    logit: Values
    """Of the test examples."""
    strength: float
    """Its C, the inverse of the ridge."""
    converged: bool


def fit_full(
    train: Any, y: Labels, test: Any, *, strengths: Sequence[float], n_folds: int, seed: int
) -> Full:
    """L2-regularised logistic regression; C has the least loss over folds of the train set.

    Columns are divided by their sd on the train set; dense ones are centred first, and where there
    are more of them than examples, turned into fewer that give the same fit.

    Args:
        train: [n, m], dense or a SciPy array.
        y: [n].
        test: [n_test, m].
        strengths: values of C to choose from.
        n_folds: as many at most; fewer where a class is smaller.
        seed: draws the folds.
    """
    from sklearn.preprocessing import StandardScaler

    if sparse.issparse(train) and train.nnz > NEARLY_DENSE * np.prod(train.shape):
        train, test = train.toarray(), test.toarray()
    if not sparse.issparse(train) and train.shape[1] > train.shape[0]:
        train, test = in_span(train, test)
    else:
        scaler = StandardScaler(with_mean=not sparse.issparse(train))
        train, test = train.astype(np.float64), test.astype(np.float64)
        train, test = scaler.fit_transform(train), scaler.transform(test)
    chosen = _strength(train, y, sorted(strengths), n_folds, seed)
    logit, converged = _decided(_regression(chosen), train, y, test)
    return Full(logit, chosen, converged)


def in_span(train: Any, test: Any) -> tuple[Values, Values]:
    """Standardised examples in coordinates of the space that the n of the train set span.

    All inner products with these stay what they are, and so does any fit that shrinks the length of
    its weights: those never leave that space.

    Args:
        train: [n, m], dense.
        test: [n_test, m].

    Returns:
        [n, n] and [n_test, n], in float64; few columns of the m are in float64 at a time.
    """
    n, m = train.shape
    inner, with_test = np.zeros((n, n)), np.zeros((len(test), n))
    for begin, end in pieces((n + len(test)) * np.arange(1, m + 1)):
        part = train[:, begin:end].astype(np.float64)
        mean, sd = part.mean(0), part.std(0)
        sd[sd < LEAST_SD] = 1.0
        part = (part - mean) / sd
        inner += part @ part.T
        with_test += (test[:, begin:end] - mean) / sd @ part.T
    inner.flat[:: n + 1] += JITTER * inner.trace() / n
    lower = linalg.cholesky(inner, lower=True, overwrite_a=True)
    return lower, linalg.solve_triangular(lower, with_test.T, lower=True).T


def _strength(train: Any, y: Labels, ascending: Sequence[float], n_folds: int, seed: int) -> float:
    """The C of the least loss over folds; larger ones are not tried once the loss rises."""
    from sklearn.model_selection import StratifiedKFold

    n_folds = min(n_folds, int(y.sum()), int((~y).sum()))
    if n_folds < 2 or len(ascending) < 2:
        return ascending[0]
    folds = StratifiedKFold(n_folds, shuffle=True, random_state=seed)
    parts = list(folds.split(np.zeros(len(y)), y))
    # Each fit begins where that of the C before ended.
    models = [_regression(ascending[0], warm_start=True) for _ in parts]
    best, least = ascending[0], np.inf
    for strength in ascending:
        loss = 0.0
        for (fit, check), model in zip(parts, models, strict=True):
            model.set_params(C=strength)
            loss += bce(_decided(model, train[fit], y[fit], train[check])[0], y[check])
        if loss >= least:
            break
        best, least = strength, loss
    return best


def _regression(strength: float, **options: Any) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=strength, max_iter=1000, **options)


def fit_few(train: Values, y: Labels, test: Values) -> Values:
    """Logits of the test examples by `LogisticRegression(C=1, max_iter=1000)`, as SAEBench's."""
    return _decided(_regression(1.0), train, y, test)[0]


def _decided(model: Any, train: Any, y: Labels, test: Any) -> tuple[Values, bool]:
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # It is in what comes back.
        model.fit(train, y)
    return np.asarray(model.decision_function(test)), bool(model.n_iter_.max() < model.max_iter)
