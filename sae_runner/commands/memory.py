"""What caching and training will hold in memory at once, in bytes: estimates from shapes alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sae_runner.commands import objectives
from sae_runner.commands.pipeline import Pipeline
from sae_runner.config import resolve_device
from sae_runner.errors import ConfigError
from sae_runner.kernels.choice import fused, ops_on
from sae_runner.kernels.selection import CHUNK_BYTES, LEAST_ROWS
from sae_runner.meters import peak_rss_bytes, physical_bytes
from sae_runner.models._precision import DTYPES
from sae_runner.models.base import HookedModel, Inputs, Model, SiteInfo
from sae_runner.saes.base import SAE
from sae_runner.store.activations import has_room

N_SAMPLE = 32768
"""Rows that an SAE's initialisation looks at."""


class Part(NamedTuple):
    """Something that is held at the peak."""

    what: str
    n_bytes: float
    where: Literal["host", "device"]
    key: str = ""
    """What makes it less."""
    sure: float = 0.0
    """The share of it that cannot be done without, whatever the estimate is worth."""


def caching(pipeline: Pipeline, infos: Sequence[SiteInfo], n_rows: int) -> list[Part]:
    """Writing the selections of `infos`, of `n_rows` training rows, in one pass of the model."""
    batch, options = pipeline.loading.batch_size, pipeline.store_options
    names = [info.name for info in infos]
    weights, forward = model_bytes(pipeline.shapes, names, batch, pipeline.context)
    tokens = [(info.n_tokens or pipeline.context or 1) * info.d for info in infos]
    window = min(n_rows, options.window_rows)
    columns = [window * (i.d * DTYPES[options.dtype].itemsize + 16) for i in infos]
    return [
        Part("model", weights, "device", "model", 1),
        Part("layers of a batch", forward + 4 * batch * sum(tokens), "device", "model.batch_size"),
        # One window as it is collected, with its largest site joined and shuffled, while the
        # window before it is being written.
        Part(
            "windows",
            (2 if n_rows > window else 1) * sum(columns) + 2 * max(columns),
            "host",
            "store.window_rows",
            1 / 4,
        ),
    ]


def training(pipeline: Pipeline, sae: SAE, n_rows: int) -> list[Part]:
    """Training, with rows from a store of `n_rows`."""
    options, store = pipeline.train_options, pipeline.store_options
    device = torch.device(resolve_device(pipeline.root.device))
    size, width = sum(p.numel() * p.element_size() for p in sae.parameters()), width_key(sae)
    batch = options.micro_batch_size or options.batch_size
    row = 4 * sae.d_in
    ahead = min(store.prefetch + 2, options.n_steps)
    sample = 3 * min(n_rows, N_SAMPLE) * row  # With the temporaries of a geometric median.
    by_rows = sae.sparse and options.n_parts == 1 and fused(ops_on(device), device)
    screened = sae.sparse and options.precision_on(device) != "fp32"
    # Chunks of scores, and of few entries of each row their score, place and gradient.
    dense = batch * 4 * sae.d_sae
    averaged = size if options.ema is not None else 0
    stored = sae.d_in * DTYPES[store.dtype].itemsize + 24
    # What a CPU keeps of a store on disk is memory-mapped still.
    moved = device.type != "cpu" or store.kind == "stream"
    kept = moved and n_rows * sae.d_in * DTYPES[store.dtype].itemsize <= store.keep_bytes
    mixed = n_rows if kept else min(n_rows, max(store.mix_rows, store.window_rows))
    there = kept and has_room(device, n_rows * sae.d_in * DTYPES[store.dtype].itemsize)
    where: Literal["host", "device"] = "device" if there else "host"
    key = "store.keep_gb" if kept else "store.mix_rows"
    chunk = max(CHUNK_BYTES.get(device.type, dense), LEAST_ROWS * 4 * sae.d_sae)
    latents = min(dense, chunk) if sae.sparse else 3 * dense
    parts = [
        Part("parameters", size, "device", width, 1),
        Part("gradients", 0 if by_rows else size, "device", width, 1),
        Part("copy of the encoder", size / 4 if screened else 0, "device", width),
        Part("Adam's moments", 2 * size, "device", width, 1),
        Part("averaged weights", averaged, "device", "trainer.ema", 1),
        # Normalising the decoder, or the copy that a checkpoint is written from.
        Part("temporaries of a step", max(2 * size, sample), "device", width),
        # Sure are the rows, and what every kind holds of their latents.
        Part(
            "activations of a batch",
            latents + batch * 6 * row,
            "device",
            "trainer.micro_batch_size",
            1 / 6,
        ),
        Part("rows mixed", mixed * stored, where, key, 1 / 2),
        Part("batches read ahead", ahead * options.batch_size * row, "device", "store.prefetch"),
    ]
    if store.kind == "stream":
        parts += caching(pipeline, [pipeline.site], n_rows)
    if objectives.runs_the_model(pipeline):
        parts += end_to_end(pipeline)
    return parts


def width_key(sae: SAE) -> str:
    """The key that its width was given by."""
    return "sae.expansion" if sae.options["d_sae"] is None else "sae.d_sae"


def end_to_end(pipeline: Pipeline) -> list[Part]:
    """The model in the loop of training, with what its gradient needs of a part of a batch."""
    options, model = pipeline.train_options, pipeline.shapes
    n_rows = options.batch_size / options.n_parts
    n_examples = max(1, round(n_rows / pipeline.rows_per_example(pipeline.site)))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    layers, output = forward_bytes(model, n_examples, pipeline.context)
    return [
        Part("model", weights, "device", "model", 1),
        Part("layers of the model", layers, "device", "trainer.micro_batch_size"),
        # Of both runs, and as probabilities.
        Part("outputs of the model", 5 * output, "device", "trainer.micro_batch_size"),
    ]


def forward_bytes(model: Model, n_examples: int, context: int | None) -> tuple[float, float]:
    """Bytes of what all layers give on a batch, and of the output."""
    if not isinstance(model, HookedModel):
        return 0.0, 0.0
    sizes = list[int]()

    def measure(_: nn.Module, __: Any, output: Any) -> None:
        for value in output if isinstance(output, tuple | list) else [output]:
            if isinstance(value, Tensor):
                sizes.append(value.numel() * value.element_size())

    leaves = [module for module in model.network.modules() if not list(module.children())]
    handles = [module.register_forward_hook(measure) for module in leaves]
    try:
        probe = model.probe(2)
        with torch.no_grad():
            output = model.forward(probe)
    finally:
        for handle in handles:
            handle.remove()
    scale = n_examples / seen_of(probe, context)
    return scale * sum(sizes), scale * output.numel() * output.element_size()


def seen_of(probe: Inputs, context: int | None) -> float:
    """How many examples a made-up batch stands for: made-up texts are short."""
    if context and "tokens" in probe.tensors:
        return len(probe) * probe.tensors["tokens"].shape[1] / context
    return len(probe)


def model_bytes(
    model: Model, sites: Sequence[str], batch_size: int, context: int | None
) -> tuple[float, float]:
    """Bytes of a network's weights, and of its largest layer on the way to `sites`, on a batch.

    The layer counts three times: what it takes, what it gives, and what it works on.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if not isinstance(model, HookedModel):
        return weights, 0.0
    largest = 0

    def measure(_: nn.Module, __: Any, output: Any) -> None:
        nonlocal largest
        for value in output if isinstance(output, tuple | list) else [output]:
            if isinstance(value, Tensor):
                largest = max(largest, value.numel() * value.element_size())

    handles = [module.register_forward_hook(measure) for module in model.network.modules()]
    try:
        probe = model.probe(2)
        with torch.no_grad():
            model.record(probe, sites)
    finally:
        for handle in handles:
            handle.remove()
    return weights, 3 * largest * batch_size / seen_of(probe, context)


def summary(parts: Sequence[Part], device: str) -> str:
    """`about 1.2 GB`, or host and device apart, with what makes up most of it."""
    base = Part("libraries and data", peak_rss_bytes(), "host")
    every = [base, *parts]
    if device == "cpu":
        total = f"about {gigabytes(sum(part.n_bytes for part in every))}"
    else:
        host = sum(part.n_bytes for part in every if part.where == "host")
        total = f"about {gigabytes(host)} and {gigabytes(sum_on_device(parts))} on {device}"
    least = 0.02 * sum(part.n_bytes for part in every)
    largest = [p for p in sorted(every, key=lambda p: -p.n_bytes)[:4] if p.n_bytes > least]
    listed = ", ".join(f"{part.what} {gigabytes(part.n_bytes)}" for part in largest)
    return f"{total}: {listed}"


def sum_on_device(parts: Sequence[Part]) -> float:
    """What lies on the device that computes."""
    return sum(part.n_bytes for part in parts if part.where == "device")


def shortage(what: str, parts: Sequence[Part], device: str) -> list[str]:
    """A warning if the estimate is more than there is."""
    on_device = sum_on_device(parts) if device != "cpu" else 0.0
    on_host = sum(part.n_bytes for part in parts) - on_device
    found = []
    for n_bytes, free, where in (
        (on_host, free_memory(), "memory"),
        (on_device, free_on(device), f"memory of {device}"),
    ):
        if free is not None and n_bytes > free:
            found.append(f"{what} needs about {gigabytes(n_bytes)} of {where}, "
                         f"{gigabytes(free)} free")  # fmt: skip
    return found


def require(what: str, parts: Sequence[Part], device: str) -> None:
    """Refuse what plainly cannot fit, even on a machine that does nothing else.

    Raises:
        ConfigError: what is sure to be held is more than there is; with the key to lower.
    """
    on_host = [part for part in parts if part.where == "host" or device == "cpu"]
    on_device = [part for part in parts if part not in on_host]
    for held, there, where in (
        (on_host, physical_bytes(), "memory, and this machine has"),
        (on_device, total_on(device), f"memory of {device}, which has"),
    ):
        needed = sum(part.sure * part.n_bytes for part in held)
        if there is not None and needed > there:
            largest = max(held, key=lambda part: part.sure * part.n_bytes)
            raise ConfigError(
                f"{what} needs at least {gigabytes(needed)} of {where} {gigabytes(there)}: lower "
                f"{largest.key} ({largest.what})"
            )


def free_memory() -> int | None:
    """Memory that a process could still get, where the system tells."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def free_on(device: str) -> int | None:
    """Free memory of a CUDA device."""
    return torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else None


def total_on(device: str) -> int | None:
    """Memory of a CUDA device."""
    return torch.cuda.mem_get_info(device)[1] if device.startswith("cuda") else None


def gigabytes(n_bytes: float) -> str:
    """Two digits are all that an estimate has."""
    return f"{float(f'{n_bytes / 1e9:.2g}'):g} GB"
