"""Keeping the latents of a pass: 8 bytes for each active latent of a row, within a limit.

Where that is more than `keep_bytes`, examples are kept by a seeded hash of their ids, as many as
fit: which ones does not depend on batches or their order.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sae_runner.data.base import Ids
from sae_runner.evaluators._codes import Codes
from sae_runner.evaluators.base import Rows

ENTRY_BYTES = 8


class CodesCollector:
    """Keeps the latents of a pass, within `keep_bytes`."""

    def __init__(self, keep_bytes: int, seed: int) -> None:
        self.keep_bytes, self.seed = keep_bytes, seed
        self.threshold = 2**63
        """Examples whose hash is below are kept."""
        self.parts: list[tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor]] = []
        self.n_bytes = 0
        self.d_sae = 0
        self.seen: set[int] = set()

    def add(self, rows: Rows) -> None:
        """Keep a batch; where that is too much, half of the examples go."""
        latents = rows.latents
        self.d_sae = latents.d_sae
        ids = rows.example_id.cpu()
        self.seen.update(np.unique(ids.numpy()).tolist())
        label = None if rows.label is None else rows.label.cpu()
        values = latents.values.detach().cpu().float()
        self._keep(
            ids,
            rows.position.cpu(),
            label,
            latents.counts.cpu(),
            latents.indices.cpu().int(),
            values,
        )
        while self.n_bytes > self.keep_bytes and self.threshold > 1:
            self.threshold //= 2
            parts, self.parts, self.n_bytes = self.parts, [], 0
            for part in parts:
                self._keep(*part)

    def _keep(
        self,
        ids: Tensor,
        position: Tensor,
        label: Tensor | None,
        counts: Tensor,
        indices: Tensor,
        values: Tensor,
    ) -> None:
        kept = torch.from_numpy(hashed(ids.numpy(), self.seed) < np.uint64(self.threshold))
        if not kept.all():
            entries = kept.repeat_interleave(counts)
            ids, position, counts = ids[kept], position[kept], counts[kept]
            label = None if label is None else label[kept]
            indices, values = indices[entries], values[entries]
        self.n_bytes += ENTRY_BYTES * len(indices)
        self.parts.append((ids, position, label, counts, indices, values))

    def finish(self) -> Codes:
        """All that was kept; the collector is empty afterwards."""
        parts, self.parts = self.parts, []
        if not parts:
            none = torch.zeros(0, dtype=torch.int64)
            return Codes(
                none, none, None, torch.zeros(1, dtype=torch.int64), none.int(), none.float(),
                self.d_sae,
            )  # fmt: skip
        ids, position, label, counts, indices, values = zip(*parts, strict=True)
        every = torch.cat(counts)
        labels = None if any(part is None for part in label) else torch.cat(label)
        example_id = torch.cat(ids)
        return Codes(
            example_id, torch.cat(position), labels,
            torch.cat([every.new_zeros(1), every.cumsum(0)]), torch.cat(indices),
            torch.cat(values), self.d_sae, len(self.seen) - len(np.unique(example_id.numpy())),
        )  # fmt: skip


def hashed(ids: Ids, seed: int) -> npt.NDArray[np.uint64]:
    """Numbers below 2^63 that look random, one of each id (SplitMix64's finaliser)."""
    with np.errstate(over="ignore"):
        z = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15) * np.uint64(seed + 1)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (z ^ (z >> np.uint64(31))) >> np.uint64(1)
