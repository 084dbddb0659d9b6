"""One window of a store: a closed group of examples, run through the model, its rows shuffled.

Disk and stream compute windows by the same function, so both give the same rows in the same order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sae_runner.data.base import Dataset, Ids, Split, Unreadable
from sae_runner.errors import DataError
from sae_runner.models._precision import DTYPES
from sae_runner.models.base import Inputs, Model, SiteInfo
from sae_runner.site import TokenSelection
from sae_runner.store.loading import load_batches


@dataclass(frozen=True)
class WindowPlan:
    """How the examples of a split are cut into windows; the same for every site of a selection."""

    ids: dict[Split, Ids]
    """Example ids of each split in the order in which they are visited."""
    window_examples: int
    seed: int
    rows_per_example: int = 1
    """The most there can be."""

    @classmethod
    def make(
        cls, dataset: Dataset, *, window_rows: int, rows_per_example: int, seed: int
    ) -> "WindowPlan":
        """Windows of about `window_rows` rows over seeded permutations of the splits."""
        ids: dict[Split, Ids] = {}
        for number, split in enumerate(("train", "heldout")):
            found = dataset.ids(split)  # type: ignore[arg-type]
            if not len(found):
                raise DataError(f"dataset: its {split} split is empty")
            if dataset.random_access:
                found = found[np.random.default_rng([seed, number]).permutation(len(found))]
            ids[split] = found  # type: ignore[index]
        return cls(ids, max(1, window_rows // rows_per_example), seed, rows_per_example)

    @property
    def window_rows(self) -> int:
        """The most rows a window can have."""
        return self.window_examples * self.rows_per_example

    def n_windows(self, split: Split) -> int:
        """How many windows a split has; the last one may be short."""
        return -(-len(self.ids[split]) // self.window_examples)

    def examples(self, split: Split, window: int) -> Ids:
        """Ids of one window, ascending: neighbours on disk are read together."""
        start = window * self.window_examples
        return np.sort(self.ids[split][start : start + self.window_examples])

    def order(self, split: Split, window: int, n_rows: int) -> Tensor:
        """The seeded permutation of a window's rows."""
        number = ("train", "heldout").index(split)
        generator = torch.Generator()
        state = np.random.SeedSequence([self.seed, number, window]).generate_state(1, np.uint64)
        generator.manual_seed(int(state[0] >> np.uint64(1)))
        return torch.randperm(n_rows, generator=generator)


@dataclass
class WindowRows:
    """The shuffled rows of one window at several sites."""

    activations: dict[str, Tensor]
    """By site: [n, d] in the store's dtype."""
    example_id: Tensor  # [n] int32
    position: Tensor  # [n] int32; -1 where tokens were averaged
    label: Tensor | None  # [n] int32; -1 where an example has none; None without classes
    bad: list[Unreadable]

    def __len__(self) -> int:
        return len(self.example_id)


def compute_window(
    model: Model,
    dataset: Dataset,
    infos: Sequence[SiteInfo],
    selection: TokenSelection,
    plan: WindowPlan,
    split: Split,
    window: int,
    *,
    batch_size: int,
    workers: int,
    dtype: str,
    on_batch: Callable[[int], None] = lambda _: None,
) -> WindowRows:
    """Run one window's examples through the model and shuffle the selected rows.

    `on_batch` is told after each batch how many examples it had, unreadable ones included.

    Raises:
        DataError: a row is NaN or infinite, or overflows `dtype`, the example is named; or the
            sites do not share their rows (see `layout_key`).
    """
    columns: dict[str, list[Tensor]] = {info.name: [] for info in infos}
    example_id, position, label = list[Tensor](), list[Tensor](), list[Tensor]()
    bad = list[Unreadable]()
    ids = plan.examples(split, window)
    for inputs, unreadable in load_batches(dataset, model, ids, batch_size, workers):
        bad += unreadable
        if inputs is None:
            on_batch(len(unreadable))
            continue
        with torch.no_grad():
            found = model.record(inputs.to(model.device), [info.name for info in infos])
        for i, info in enumerate(infos):
            x, ids_of_rows, positions, rows_of = select_rows(
                found[info.name], info, selection, inputs
            )
            columns[info.name].append(stored(x, dtype, info, ids_of_rows))
            if i == 0:
                example_id.append(ids_of_rows)
                position.append(positions)
                labels = inputs.labels
                if labels is None:
                    labels = torch.full((len(inputs),), -1)
                label.append(labels[rows_of].int())
            elif not (
                torch.equal(ids_of_rows, example_id[-1]) and torch.equal(positions, position[-1])
            ):
                raise DataError(
                    f"site.name: {infos[0].name} and {info.name} differ in their tokens and cannot "
                    "be written in one pass; cache them one after the other"
                )
        on_batch(len(inputs) + len(unreadable))
    if not example_id:  # Whether so many unreadable examples are too many is not decided here.
        rows = {info.name: torch.empty(0, info.d, dtype=DTYPES[dtype]) for info in infos}
        none = torch.empty(0, dtype=torch.int32)
        return WindowRows(rows, none, none, none if dataset.label_names else None, bad)
    n_rows = sum(map(len, example_id))
    order = plan.order(split, window, n_rows)
    return WindowRows(
        {name: torch.cat(columns.pop(name))[order] for name in list(columns)},
        torch.cat(example_id)[order],
        torch.cat(position)[order],
        torch.cat(label)[order] if dataset.label_names else None,
        bad,
    )


def select_rows(
    x: Tensor, info: SiteInfo, selection: TokenSelection, inputs: Inputs
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows [n, d], their example ids, token positions and row numbers in the batch."""
    keep = selection.mask(info, inputs, x.shape[1])
    if selection.tokens == "mean":
        rows = keep.any(1).nonzero().squeeze(1)
        kept = keep.unsqueeze(2).to(x.device)
        # Filled, not multiplied by 0: what is left out may be NaN (padding, in some hosts).
        sums = x.float().masked_fill(~kept, 0).sum(1)
        chosen = (sums / kept.sum(1).clamp_min(1))[rows.to(x.device)]
        return chosen.cpu(), inputs.ids[rows].int(), torch.full_like(rows, -1).int(), rows
    rows, positions = keep.nonzero(as_tuple=True)
    everything = bool(keep.all())  # The common case of images needs no gather.
    chosen = x.flatten(0, 1) if everything else x[rows.to(x.device), positions.to(x.device)]
    return chosen.cpu(), inputs.ids[rows].int(), positions.int(), rows


def stored(x: Tensor, dtype: str, info: SiteInfo, ids: Tensor) -> Tensor:
    """`x` in the store's dtype, refused if anything in it is not finite there."""
    kept = x.to(DTYPES[dtype])
    if torch.isfinite(kept).all():
        return kept
    if not torch.isfinite(x).all():
        row = int((~torch.isfinite(x)).any(1).nonzero()[0])
        raise DataError(f"{info.name}: activation of example {int(ids[row])} is NaN or infinite")
    row = int((~torch.isfinite(kept)).any(1).nonzero()[0])
    raise DataError(
        f"store.dtype={dtype}: {info.name} reaches {float(x.abs().max()):.3g} at example "
        f"{int(ids[row])}, which overflows; use store.dtype=bf16 or fp32"
    )
