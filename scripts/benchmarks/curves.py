"""One training four times, from the same weights and batches, and a figure of the losses.

By the dense definition (autograd through all latents, a dense Adam) in float64, which the others
are compared with, and in float32, which says what rounding alone does; by the sparse path on
PyTorch's operations, and by the native kernels, the latter two with `trainer.precision=auto`.
Further words are `key=value` of `sae-run train`, such as `dataset.path=…`; the figure is
written as PNG and SVG where --figures says.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.cache import composed
from benchmarks.results import Ratio, Result
from benchmarks.trainers import trainer_on
from sae_runner.commands.cache import ensure_store
from sae_runner.config import construct
from sae_runner.kernels import native_ops
from sae_runner.kernels.autograd import Reconstruction
from sae_runner.kernels.choice import Kernels, using
from sae_runner.report.style import COLOURS, house_style, new_figure, save
from sae_runner.saes.base import SAE, Loss, TrainState
from sae_runner.saes.topk import TopK
from sae_runner.store.activations import Activations

DEFINITION = "dense definition, float64"
CONTROL = "dense definition, float32"


class DenseTopK(TopK):
    """TopK as it is defined: through dense latents."""

    def loss(self, x: Float[Tensor, "n d_in"], state: TrainState) -> Loss:
        """See `TopK.loss`."""
        acts, scaled = self.encode(x), self.scaled(x)
        found = Reconstruction.of(scaled, self.decode_scaled(acts))
        return self.loss_of(x, scaled, found, acts.detach().count_nonzero(0))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its own options."""
    parser.add_argument("--model", default="minilm", help="model option")
    parser.add_argument("--examples", type=int, default=8192)
    parser.add_argument("--train-steps", type=int, default=300)
    parser.add_argument("--figures", type=Path, default=Path("outputs/benchmarks"))


def run(options: argparse.Namespace, folder: Path) -> Result:
    """See the module."""
    words = [f"model={options.model}", *options.overrides]
    if not any(word.startswith("dataset.n_examples") for word in words):
        words.append(f"dataset.n_examples={options.examples}")
    pipeline = composed(words, folder)
    ensure_store(pipeline)
    store, sae = pipeline.open_store(), pipeline.build_sae(pipeline.site.d)
    if type(sae) is not TopK:
        raise SystemExit(f"sae={sae.kind}: the curves are of topk")
    trainer = dict(pipeline.cfg["trainer"])
    own = {**trainer, "n_tokens": options.train_steps * trainer["batch_size"]}
    own.pop("objective", None)
    paths: dict[str, tuple[Kernels, dict[str, Any]]] = {
        DEFINITION: ("torch", {"precision": "fp32"}),
        CONTROL: ("torch", {"precision": "fp32"}),
        "sparse, PyTorch": ("torch", {}),
    }
    if native_ops.available():
        paths["sparse, native kernels"] = ("auto", {})
    curves = {}
    for name, (kernels, precision) in paths.items():
        kind = DenseTopK if name in (DEFINITION, CONTROL) else TopK
        dtype = torch.float64 if name == DEFINITION else torch.float32
        with using(kernels):
            losses = losses_of(store, sae, kind, {**own, **precision}, pipeline.dead_latents, dtype)
            curves[name] = np.array(list(losses))
        print(f"{name:28} loss {curves[name][0]:.6f} … {curves[name][-1]:.6f}")
    return drawn(curves, options, f"{options.model}, {pipeline.site.name}, {sae.d_sae} latents")


def losses_of(
    store: Activations,
    like: SAE,
    kind: type[TopK],
    own: dict[str, Any],
    dead_latents: dict[str, Any],
    dtype: torch.dtype,
) -> Iterator[float]:
    """The loss of each step of a training."""
    sae = construct(kind, without_type(like.config()), where="sae", d_in=like.d_in)
    trainer = trainer_on(store, Path(os.devnull), {}, own, sae=sae, dead_latents=dead_latents)
    trainer.sae.to(dtype)  # After its weights are drawn, which are other ones in float64.
    for batch in trainer.batches():
        assert isinstance(batch.x, Tensor)
        yield float(trainer.take_step(batch.x)[0].total)
        trainer.step += 1


def without_type(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a class, without what a registry finds it by."""
    return {key: value for key, value in options.items() if key != "type"}


def drawn(curves: dict[str, Any], options: argparse.Namespace, what: str) -> Result:
    """Write the figure, and say how far the curves are apart."""
    reference = curves[DEFINITION]
    steps = np.arange(1, len(reference) + 1)
    apart = {
        name: np.abs(losses - reference) / reference
        for name, losses in curves.items()
        if name != DEFINITION
    }
    widths, styles = (5.0, 3.5, 2.0, 1.0), ("-", "-", "-", "--")
    with house_style():
        figure = new_figure(7.5, 5.5, "Fast and dense path, the same weights and batches", what)
        above, below = figure.subplots(2, 1, sharex=True)
        colours = dict(zip(curves, ("#BBBBBB", *COLOURS), strict=False))
        for i, (name, losses) in enumerate(curves.items()):
            above.plot(steps, losses, styles[i], color=colours[name], lw=widths[i], label=name)
        for name, difference in apart.items():
            below.plot(steps, difference.clip(1e-9), color=colours[name], lw=1, label=name)
        above.set(title="Loss of the step", yscale="log")
        above.legend()
        below.set(title="Relative difference to float64", xlabel="step", yscale="log")
        below.legend()
        for path in save(figure, options.figures, "fast_and_dense"):
            print(path)
    largest = {name: float(difference.max()) for name, difference in apart.items()}
    for name, difference in largest.items():
        print(f"{name:28} largest relative difference {difference:.2e}")
    worst = max(value for name, value in largest.items() if name != CONTROL)
    return Result(
        f"over {len(steps)} steps losses of the sparse paths differ from float64 by {worst:.1e} at "
        f"most, relatively; those of the dense one in float32 by {largest[CONTROL]:.1e}",
        [
            Ratio("apart", worst, "most"),
            Ratio("apart:control", worst / max(largest[CONTROL], 1e-12), "most"),
        ],
        {name: losses.tolist() for name, losses in curves.items()},
    )
