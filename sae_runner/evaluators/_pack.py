"""A blinded pack of items to rate: which rater sees which, and one page that needs no network.

An item's id is HMAC-SHA256(seed, source:id), its place in the pack is by that id, and neither
source nor number of a latent is in the pack; activations are shown as shares of the item's own
largest.
"""

import base64
import hashlib
import hmac
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from sae_runner.evaluators._responses import SCORES

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
ID_LENGTH = 16
_TAG = 0x7061636B  # "pack"
APART = 4
"""What comes again comes in the last 1/APART of a rater's items, and is of their first half."""


def item_id(seed: int, source: str, number: int) -> str:
    """What an item is called in the pack."""
    message = f"{source}:{number}".encode()
    return hmac.new(str(seed).encode(), message, hashlib.sha256).hexdigest()[:ID_LENGTH]


class Turn(NamedTuple):
    """One item that a rater is shown."""

    item: str
    repeat: int
    """1 where it is shown to this rater again."""


def plan(
    sources: Mapping[str, str], n_raters: int, shared: float, repeated: float, seed: int
) -> dict[str, list[Turn]]:
    """What each rater is shown, in an order of their own, by the rater's number from 1.

    Args:
        sources: source by item.
        n_raters: how many raters there are.
        shared: share of each source's items that all raters rate; the rest is dealt out.
        repeated: share of a rater's items that come again near the end.
        seed: of what is drawn.
    """
    generator = np.random.default_rng([seed, _TAG])
    own: list[list[str]] = [[] for _ in range(n_raters)]
    dealt = 0
    for source in sorted(set(sources.values())):
        items = sorted(item for item in sources if sources[item] == source)
        items = [items[i] for i in generator.permutation(len(items))]
        n_shared = max(round(shared * len(items)), int(shared > 0))
        for mine in own:
            mine += items[:n_shared]
        for item in items[n_shared:]:
            own[dealt % n_raters].append(item)
            dealt += 1
    turns = {}
    for number, mine in enumerate(own, 1):
        order = [Turn(mine[i], 0) for i in generator.permutation(len(mine))]
        n_again = min(max(round(repeated * len(mine)), int(repeated > 0)), len(mine) // 2)
        again = generator.choice(len(mine) // 2, n_again, replace=False)
        for turn in [order[i] for i in again]:
            low = len(order) - len(order) // APART
            place = int(generator.integers(low, len(order) + 1))
            order.insert(place, turn._replace(repeat=1))
        turns[str(number)] = order
    return turns


class Pictures:
    """Images of a pack, each once, however many items show it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.places: dict[int, int] = {}
        self.data: list[str] = []

    def place(self, example_id: int, image: Image.Image) -> int:
        """The number of an example's image among `data`."""
        if example_id not in self.places:
            self.places[example_id] = len(self.data)
            self.data.append(data_uri(image, self.size))
        return self.places[example_id]


def data_uri(image: Image.Image, size: int) -> str:
    """An image of at most `size` pixels on its longer side, as the page holds it."""
    image = image.copy()
    image.thumbnail((size, size))
    buffer, small = io.BytesIO(), max(image.size) <= 32
    image.save(buffer, "PNG" if small else "JPEG", **({} if small else {"quality": 80}))
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


class Pack(NamedTuple):
    """Items and who is shown which."""

    id: str
    """Hash of all the rest."""
    kind: str
    """`text` or `image`."""
    fields: tuple[str, ...]
    items: list[dict[str, Any]]
    turns: dict[str, list[Turn]]
    images: list[str]

    @classmethod
    def of(
        cls,
        kind: str,
        fields: Sequence[str],
        items: Sequence[dict[str, Any]],
        turns: dict[str, list[Turn]],
        images: list[str],
    ) -> "Pack":
        """With the items in the order of their ids, which says nothing of where they are from."""
        ordered = sorted(items, key=lambda item: str(item["item"]))
        whole = json.dumps([kind, list(fields), ordered, turns, images], sort_keys=True)
        return cls(
            hashlib.sha256(whole.encode()).hexdigest()[:ID_LENGTH], kind, tuple(fields), ordered,
            turns, images,
        )  # fmt: skip

    def lines(self) -> str:
        """items.jsonl."""
        return "".join(json.dumps({"pack": self.id, **item}) + "\n" for item in self.items)

    def page(self) -> str:
        """pack.html."""
        data = {
            "pack": self.id, "kind": self.kind, "items": self.items, "images": self.images,
            "fields": {name: SCORES[name] for name in self.fields}, "scores": list(SCORES),
            # Half of the raters do not see how strong an interval is.
            "raters": {number: {"turns": turns, "labels": int(number) % 2 == 1}
                       for number, turns in self.turns.items()},
        }  # fmt: skip
        text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
        here = Path(__file__).parent
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>Rating pack {escape(self.id)}</title>\n"
            f"<style>\n{(here / '_pack.css').read_text('utf-8')}</style></head>\n"
            f'<body><script type="application/json" id="pack">{text}</script>\n'
            f"<main></main>\n<script>\n{(here / '_pack.js').read_text('utf-8')}</script>\n"
            "</body></html>\n"
        )
