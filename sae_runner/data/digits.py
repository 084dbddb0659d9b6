"""Handwritten digits that come with scikit-learn: images for a run that downloads nothing."""

import hashlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from sae_runner.config import NonNegative, Positive, ProperFraction
from sae_runner.data import DATASETS
from sae_runner.data.base import Dataset, Example, Ids, Split, Unreadable, split_ids

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@DATASETS.register("digits")
class Digits(Dataset):
    """1,797 grey images of 8 × 8 pixels in ten classes (Alpaydin and Kaynak, UCI, 1998).

    Args:
        heldout: share of the images that is never trained on.
        n_examples: at most so many images to train on; None for all.
        n_heldout: at most so many held-out images; None for all.
        seed: decides who is held out.
    """

    modality = "image"
    name = "digits"
    label_names = NAMES

    def __init__(
        self,
        *,
        heldout: ProperFraction,
        n_examples: Positive | None,
        n_heldout: Positive | None,
        seed: NonNegative,
    ) -> None:
        from sklearn.datasets import load_digits

        found = load_digits()
        # 17 grey levels, from 0 to 16; an image has 256.
        self.pixels = np.round(found.images * (255 / 16)).astype(np.uint8)
        self.labels = found.target.astype(np.int64)
        self.heldout, self.seed = heldout, seed
        self.limits: dict[Split, int | None] = {"train": n_examples, "heldout": n_heldout}

    def ids(self, split: Split) -> Ids:
        """See `Dataset.ids`."""
        n, limit = len(self.pixels), self.limits[split]
        return split_ids(n, split, heldout=self.heldout, seed=self.seed, limit=limit)

    def load(self, ids: Sequence[int] | Ids) -> list[Example | Unreadable]:
        """The images of `ids`, in PIL's mode L."""
        return [Example(int(i), Image.fromarray(self.pixels[i]), int(self.labels[i])) for i in ids]

    def fingerprint(self) -> str:
        """See `Dataset.fingerprint`."""
        return hashlib.sha256(self.pixels.tobytes() + self.labels.tobytes()).hexdigest()
