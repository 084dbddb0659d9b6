"""Contrastive training of a small CLIP on captioned images, and the words it reads."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from sae_runner.models._fitting import fit

_MOST_LOGIT_SCALE = math.log(100)  # CLIP's bound.


class WordTokenizer:
    """Lower-case words as tokens: 0 pads, words count from 1, the highest token ends a text.

    A word that was not in any training caption is left out.
    """

    def __init__(self, words: Sequence[str], context_length: int) -> None:
        self.words, self.context_length = list(words), context_length
        self.ids = {word: i + 1 for i, word in enumerate(self.words)}
        self.end = len(self.words) + 1

    @classmethod
    def from_texts(
        cls, texts: Iterable[str], context_length: int, max_words: int
    ) -> "WordTokenizer":
        """The most frequent words of `texts`, the most frequent first."""
        counts = Counter(word for text in texts for word in words_of(text))
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(ranked[:max_words], context_length)

    @property
    def vocab_size(self) -> int:
        """Words, padding and the end."""
        return self.end + 1

    def __call__(self, texts: list[str]) -> Int64[Tensor, "n context"]:
        """Tokens of each text, cut to the context length."""
        tokens = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
        for row, text in enumerate(texts):
            known = [self.ids[word] for word in words_of(text) if word in self.ids]
            known = [*known[: self.context_length - 1], self.end]
            tokens[row, : len(known)] = torch.tensor(known)
        return tokens


def words_of(text: str) -> list[str]:
    """The lower-case words and numbers of a text."""
    return re.findall(r"[^\W_]+", text.lower())


@dataclass
class Pairs:
    """Images, and for each the texts that describe it and what they mean."""

    pixels: UInt8[Tensor, "n 3 h w"]
    texts: list[list[str]]
    """One or more ways to describe each image."""
    groups: Int64[Tensor, " n"]
    """Equal where the texts mean the same: a class, or one caption."""

    def __len__(self) -> int:
        return len(self.groups)


@dataclass(frozen=True)
class Recipe:
    """How a small CLIP is trained."""

    epochs: int
    train_batch: int
    learning_rate: float
    weight_decay: float
    warmup: float
    """Share of the steps over which the learning rate rises, before it falls as a cosine."""
    shift: int
    """Images move by at most so many pixels in each direction."""
    flip: bool
    """Half of the images are mirrored."""
    seed: int


def contrastive_loss(
    images: Float[Tensor, "n d"],
    texts: Float[Tensor, "m d"],
    scale: Float[Tensor, ""],
    image_groups: Int64[Tensor, " n"],
    text_groups: Int64[Tensor, " m"],
) -> Float[Tensor, ""]:
    """Cross-entropy both ways, the target spread over all pairs that mean the same.

    With one pair per meaning this is CLIP's loss (Radford et al. 2021, figure 3); several images
    of a class are no negatives of each other's text (Yang et al. 2022, equations 2 to 4).
    """
    logits = scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    same = (image_groups[:, None] == text_groups[None, :]).to(logits.dtype)
    to_text = F.cross_entropy(logits, same / same.sum(1, keepdim=True))
    to_image = F.cross_entropy(logits.T, same.T / same.T.sum(1, keepdim=True))
    return (to_text + to_image) / 2


def shifted(
    pixels: Float[Tensor, "n c h w"], reach: int, flip: bool, generator: torch.Generator
) -> Float[Tensor, "n c h w"]:
    """Each image moved by up to `reach` pixels (its edge is repeated) and perhaps mirrored."""
    n, _, height, width = pixels.shape
    if reach:
        padded = F.pad(pixels, (reach,) * 4, mode="replicate")
        top, left = torch.randint(2 * reach + 1, (2, n), generator=generator)
        rows = (top[:, None] + torch.arange(height)).to(pixels.device)
        columns = (left[:, None] + torch.arange(width)).to(pixels.device)
        each = torch.arange(n, device=pixels.device)[:, None, None]
        moved = padded.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]]
        pixels = moved.permute(0, 3, 1, 2)
    if flip:
        mirrored = (torch.rand(n, generator=generator) < 0.5).to(pixels.device)
        pixels = torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)
    return pixels


def train(
    network: nn.Module,
    tokenize: WordTokenizer,
    pairs: Pairs,
    normalise: Callable[[Tensor], Tensor],
    recipe: Recipe,
    device: torch.device,
    kept: Path,
) -> float:
    """Train `network` (an open_clip CLIP) in place; the mean loss of the last epoch.

    The same seed gives the same weights on the same device and number of threads, also when it was
    stopped in between and goes on from what lies in `kept`.
    """
    batch = min(recipe.train_batch, len(pairs))
    per_epoch = len(pairs) // batch
    generator = torch.Generator().manual_seed(recipe.seed + 1)

    def clamp() -> None:
        with torch.no_grad():
            network.logit_scale.clamp_(0, _MOST_LOGIT_SCALE)  # type: ignore[operator]

    def loss_of(chosen: Tensor) -> Tensor:
        clamp()
        pixels = normalise(pairs.pixels[chosen].to(device))
        pixels = shifted(pixels, recipe.shift, recipe.flip, generator)
        texts, groups = described(pairs, chosen, generator)
        return contrastive_loss(
            network.encode_image(pixels),  # type: ignore[operator]
            network.encode_text(tokenize(texts).to(device)),  # type: ignore[operator]
            network.logit_scale.exp(),  # type: ignore[operator]
            pairs.groups[chosen].to(device),
            groups.to(device),
        )

    n_steps = recipe.epochs * per_epoch
    losses = fit(
        network,
        optimizer_of(network, recipe),
        batches(len(pairs), batch, recipe),
        loss_of,
        lambda step: rate(step, n_steps, recipe.warmup),
        n_steps=n_steps, kept=kept, what="tiny_clip", max_grad_norm=1.0, generators=[generator],
    )  # fmt: skip
    clamp()
    return sum(losses[-per_epoch:]) / per_epoch


def batches(n: int, batch: int, recipe: Recipe) -> Iterator[Int64[Tensor, " batch"]]:
    """Rows of every step; each epoch is shuffled anew and leaves out what fills no batch."""
    generator = torch.Generator().manual_seed(recipe.seed)
    for _ in range(recipe.epochs):
        order = torch.randperm(n, generator=generator)
        yield from torch.split(order[: n // batch * batch], batch)


def described(
    pairs: Pairs, chosen: Int64[Tensor, " n"], generator: torch.Generator
) -> tuple[list[str], Int64[Tensor, " m"]]:
    """One text of each chosen image, drawn, each different text once; and the groups of these."""
    rows = chosen.tolist()
    draws = torch.rand(len(rows), generator=generator).tolist()
    groups = pairs.groups[chosen].tolist()
    found: dict[tuple[str, int], None] = {}
    for row, draw, group in zip(rows, draws, groups, strict=True):
        options = pairs.texts[row]
        found[options[int(draw * len(options))], group] = None
    return [text for text, _ in found], torch.tensor([group for _, group in found])


def optimizer_of(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW that decays matrices only."""
    matrices = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay},
         {"params": others, "weight_decay": 0.0}],
        lr=recipe.learning_rate, betas=(0.9, 0.98),
    )  # fmt: skip


def rate(step: int, n_steps: int, warmup: float) -> float:
    """Share of the peak learning rate at a step: a linear rise, then a cosine to zero."""
    n_warmup = max(1, round(warmup * n_steps))
    if step < n_warmup:
        return (step + 1) / n_warmup
    done = (step - n_warmup) / max(1, n_steps - n_warmup)
    return 0.5 * (1 + math.cos(math.pi * done))
