"""One training step of a TopK SAE: dense PyTorch, sparsify's way, and ours by each of its paths.

dense          PyTorch as its documentation would have it: autograd through a dense [n, d_sae],
               torch.topk, torch.optim.Adam with its defaults, float32
dense-bf16     the same under bfloat16 autocast with a fused Adam, compiled on CUDA; its selection
               is not that of float32
sparsify       as sparsify publishes it: an encoder whose gradient is one index_add_ of [n k, d_in],
               a decoder that is an embedding_bag (PyTorch's, where sparsify has its own Triton one
               on CUDA); of AuxK no gradient reaches the encoder; autocast on CUDA
torch-fp32     ours, by PyTorch's operations
torch-screened the same, chosen by a bfloat16 screen and scored in float32
native-*       ours, by the C++ kernels (Triton on CUDA, there called triton-*); the screen is in
               int8 where the processor has matrix units for it
triton-recorded  screened, its kernels started together as a CUDA graph, after four steps that are
               not timed; left out with --auxk, as there is no record of what dead latents add
bound          what PyTorch cannot leave out: the encoder's product (in bfloat16 where the processor
               has matrix units for it), a fused Adam over all weights, and four gathers of the
               chosen rows, each alone and at its best

Each is a process that is visited in turn; its peak memory is its own, and allocator settings are
the same for all. `fvu` is the share of the variance that the last step found unexplained: all begin
with the same weights and make equally many steps, so it says whether they do the same work. Ratios:
`SIDE:dense` and `SIDE:sparsify` (times as fast), `SIDE:bound` (share of the bound), `SIDE:memory`
(of dense's peak) and `SIDE:own_memory` (the same above what a process holds before its first
tensor, half a GB where torch brings CUDA along).
"""

import argparse
import contextlib
import statistics
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.results import Ratio, Result, Timed, spread, times_as_fast
from benchmarks.step_sides import SIDES
from benchmarks.visits import Visited
from sae_runner.kernels import native_ops, triton_ops
from sae_runner.kernels.selection import multiplies_bf16

MEMORY = {"peak_mib": "memory", "above_start_mib": "own_memory"}
"""What is said of memory, and the ratio to dense that is made of it."""
SHAPES = {"A": (768, 12288, 4096, 32), "B": (1024, 65536, 1024, 32), "quick": (32, 256, 64, 4)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its own options."""
    parser.add_argument(
        "--shape", type=shape, action="append", metavar="d_in,d_sae,batch,k",
        help="or A, B, quick; several times for several (default: A and B)",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=2, help="in each visit")
    parser.add_argument("--sides", type=sides, metavar="a,b,c", help="default: all there are here")
    parser.add_argument("--auxk", action="store_true", help="10%% of the latents are dead")
    parser.add_argument("--clip", action="store_true", help="gradients to norm 1, on all sides")
    parser.add_argument("--unit", action="store_true", help="decoder rows of norm 1, on all sides")
    parser.add_argument(
        "--give-back", action="store_true",
        help="the allocator gives freed memory back, on all sides; `sae-run` lets it keep it",
    )  # fmt: skip
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")


def shape(text: str) -> tuple[int, ...]:
    """A shape by its name or its four numbers."""
    if text in SHAPES:
        return SHAPES[text]
    found = tuple(int(number) for number in text.split(","))
    if len(found) != 4:
        raise argparse.ArgumentTypeError(f"{text}: d_in,d_sae,batch,k or {', '.join(SHAPES)}")
    return found


def sides(text: str) -> list[str]:
    """Names of sides."""
    found = text.split(",")
    for name in found:
        if name not in SIDES:
            raise argparse.ArgumentTypeError(f"no side {name!r}; there are {', '.join(SIDES)}")
    return found


def run(options: argparse.Namespace, folder: Path) -> Result:
    """See the module; with several shapes, ratios of the first come first."""
    shapes = options.shape or [SHAPES["A"], SHAPES["B"]]
    results = [run_shape(one, options) for one in shapes]
    if len(results) == 1:
        return results[0]
    named = {"x".join(map(str, s)): r for s, r in zip(shapes, results, strict=True)}
    ratios = [
        ratio._replace(name=f"{name}:{ratio.name}")
        for name, result in named.items()
        for ratio in result.ratios
    ]
    headline = "\n".join(f"{name}: {result.headline}" for name, result in named.items())
    return Result(headline, ratios, {name: result.sides for name, result in named.items()})


def sides_here(device: str) -> list[str]:
    """What can be compared on this machine."""
    cuda = device == "cuda"
    screened = multiplies_bf16(torch.device(device))
    kernels = ["torch"]
    if triton_ops.available() if cuda else native_ops.available():
        kernels.append("triton" if cuda else "native")
    ours = [f"{k}-{p}" for k in kernels for p in (["fp32", "screened"] if screened else ["fp32"])]
    if "triton-screened" in ours:
        ours.append("triton-recorded")
    return ["dense", *(["dense-bf16"] if cuda else []), "sparsify", *ours, "bound"]


def run_shape(one: tuple[int, ...], options: argparse.Namespace) -> Result:
    """Compare all sides at one shape."""
    d_in, d_sae, batch, k = one
    extras = [name for name in ("auxk", "clip", "unit") if getattr(options, name)]
    print(f"\nd_in {d_in}, d_sae {d_sae}, batch {batch}, k {k}", *extras, sep=", ")
    asked = {
        "d_in": d_in, "d_sae": d_sae, "batch": batch, "k": k, "steps": options.steps,
        "auxk": options.auxk, "clip": options.clip, "unit": options.unit,
        "device": options.device,
    }  # fmt: skip
    names = options.sides or sides_here(options.device)
    if options.auxk:  # There is no record of a step in which the dead add something.
        names = [name for name in names if name != "triton-recorded"]
    times: Timed = {name: [] for name in names}
    last: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        visited = {
            name: stack.enter_context(
                Visited("step_sides", {**asked, "side": name}, keeps=not options.give_back)
            )
            for name in names
        }
        for repeat in range(options.repeats + 1):
            for name, process in visited.items():
                last[name] = process.visit()
                if repeat:  # The first warms up.
                    times[name].append(last[name]["seconds"])
    return compared(times, last)


def compared(times: Timed, last: dict[str, dict[str, Any]]) -> Result:
    """Print the table, and name its ratios."""
    print(
        f"{'':16}{'ms':>8}{'min':>8}{'max':>8}{'to dense':>10}{'to sparsify':>12}{'of bound':>9}"
        f"{'peak MiB':>10}{'of dense':>10}{'above start':>13}{'of dense':>10}{'fvu':>8}"
    )
    ratios, rows = list[Ratio](), dict[str, Any]()
    for name, seconds in times.items():
        row = rows[name] = spread([1000 * s for s in seconds]) | last[name] | {"seconds": seconds}
        row |= {
            other: times_as_fast(times, name, other) if other in times else None
            for other in ("dense", "sparsify", "bound")
        }
        dense = last.get("dense")
        for part in ("peak_mib", "above_start_mib"):
            row[MEMORY[part]] = row[part] / dense[part] if dense else None
        print(line_of(name, row))
        if name != "bound":
            ratios += ratios_of(name, row)
    if "bound" in last:
        parts = ", ".join(f"{k} {1000 * v:.1f} ms" for k, v in last["bound"]["parts"].items())
        print(f"bound, its last visit: {parts}")
    ours = [ratio for ratio in ratios if ratio.name.startswith(("native", "triton", "torch"))]
    first = max(ours or ratios, key=lambda r: r.value if r.name.endswith(":dense") else -1.0)
    ms = statistics.median(times[first.name.split(":")[0]]) * 1000
    return Result(
        f"{first.name.split(':')[0]}: {ms:.1f} ms a step, {first.name} {first.value:.2f}",
        [first, *(ratio for ratio in ratios if ratio is not first)],
        rows,
    )


def ratios_of(name: str, row: dict[str, Any]) -> list[Ratio]:
    """Those of one side that are known, but for the trivial."""
    found = []
    for other in ("dense", "sparsify", "bound", *MEMORY.values()):
        if row[other] is not None and other != name and (name, other[-6:]) != ("dense", "memory"):
            bound: Literal["least", "most"] = "most" if other in MEMORY.values() else "least"
            found.append(Ratio(f"{name}:{other}", row[other], bound))
    return found


def line_of(name: str, row: dict[str, Any]) -> str:
    """A line of the table; what is not known stays empty."""

    def cell(value: float | None, spec: str, width: int) -> str:
        return f"{'' if value is None else format(value, spec):>{width}}"

    times = "".join(cell(row[key], ".1f", 8) for key in ("median", "min", "max"))
    ratios = cell(row["dense"], ".2f", 10) + cell(row["sparsify"], ".2f", 12)
    memory = "".join(
        cell(row[part], ",.0f", width) + cell(row[of_dense], ".2f", 10)
        for (part, of_dense), width in zip(MEMORY.items(), (10, 13), strict=True)
    )
    bound, fvu = cell(row["bound"], ".0%", 9), cell(row["fvu"], ".4f", 8)
    return f"{name:16}{times}{ratios}{bound}{memory}{fvu}"
