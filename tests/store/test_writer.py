import errno
import hashlib
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae_runner import files
from sae_runner.errors import DataError
from sae_runner.site import TokenSelection
from sae_runner.store import writer
from sae_runner.store.manifest import is_complete
from sae_runner.store.reader import ActivationStore

SPLITS = ("train", "heldout")


def shards(folder: Path, split: str) -> list[dict[str, torch.Tensor]]:
    return [load_file(path) for path in sorted(folder.glob(f"{split}-*.safetensors"))]


def joined(folder: Path, split: str) -> dict[str, torch.Tensor]:
    found = shards(folder, split)
    return {name: torch.cat([shard[name] for shard in found]) for name in found[0]}


def test_every_token_of_every_example_is_one_row_that_the_host_gives(world):
    embed, block = world.write("embed", "blocks.0.resid_post")
    weight, bias = world.host.network.block.weight, world.host.network.block.bias
    for split in SPLITS:
        rows = joined(embed, split)
        i, p = rows["example_id"], rows["position"]
        found = list(zip(i.tolist(), p.tolist(), strict=True))
        assert len(found) == len(set(found)) and set(found) == world.tokens(split)
        assert torch.equal(
            rows["activations"], torch.stack([i, p, i * p, torch.ones_like(i)], 1).float()
        )
        assert torch.equal(rows["label"], i % 3)
        torch.testing.assert_close(rows["norm"], rows["activations"].norm(dim=1))
        # The other site has the same rows in the same order.
        after = joined(block, split)
        assert torch.equal(after["example_id"], i) and torch.equal(after["position"], p)
        torch.testing.assert_close(after["activations"], rows["activations"] @ weight.T + bias)
    assert len(shards(embed, "train")) > 2


def test_a_window_holds_its_own_examples_only(world):
    folder = world.write()[0]
    plan = world.plan()
    assert plan.window_examples == 50 // 7
    for split in SPLITS:
        for number, shard in enumerate(shards(folder, split)):
            ids = shard["example_id"].tolist()
            assert set(ids) == set(plan.examples(split, number).tolist())
            assert ids != sorted(ids) or len(set(ids)) == 1


def test_the_manifest_says_what_is_there(world):
    folder = world.write("blocks.0.resid_post")[0]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["schema"] == "sae-run.selection/1"
    assert (manifest["d"], manifest["dtype"], manifest["seed"]) == (6, "fp32", 0)
    assert manifest["site"]["name"] == "blocks.0.resid_post" and manifest["unreadable"] == []
    assert manifest["selection"]["tokens"] == "all"
    means = load_file(folder / manifest["stats"]["file"])
    for split in SPLITS:
        said, x = manifest["splits"][split], joined(folder, split)["activations"].double()
        assert said["n_rows"] == len(x)
        assert said["n_examples"] == len(world.dataset.ids(split))
        assert said["mean_norm"] == pytest.approx(float(x.norm(dim=1).mean()), rel=1e-6)
        assert said["mean_square_norm"] == pytest.approx(float(x.square().sum(1).mean()), rel=1e-6)
        assert means[f"{split}.mean"].dtype == torch.float64
        torch.testing.assert_close(means[f"{split}.mean"], x.mean(0), rtol=1e-12, atol=1e-12)
        for shard in said["shards"]:
            content = (folder / shard["file"]).read_bytes()
            assert shard["bytes"] == len(content)
            assert shard["sha256"] == hashlib.sha256(content).hexdigest()
    store = json.loads((folder.parent / "store.json").read_text())
    assert store["schema"] == "sae-run.store/1"
    assert store["model"]["fingerprint"] == world.host.fingerprint()
    assert store["dataset"]["fingerprint"] == world.dataset.fingerprint()
    assert store["source"] == {"data": "x"}
    assert set(store["sites"]) == {"embed", "blocks.0.resid_post"}
    assert sorted(p.suffix for p in folder.iterdir() if p.suffix != ".safetensors") == [".json"]


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"),
    [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)],
)
def test_rows_are_rounded_to_the_dtype_and_no_further(world, dtype, torch_dtype):
    exact = joined(world.write("blocks.0.resid_post", folder="exact")[0], "train")["activations"]
    world.dtype = dtype
    folder = world.write("blocks.0.resid_post")[0]
    rows = joined(folder, "train")
    assert rows["activations"].dtype == torch_dtype
    assert torch.equal(rows["activations"], exact.to(torch_dtype))
    torch.testing.assert_close(rows["norm"], exact.to(torch_dtype).float().norm(dim=1))
    read = torch.cat([r.x for r in ActivationStore(folder).rows("train", 16)])
    assert read.dtype == torch.float32 and torch.equal(read, exact.to(torch_dtype).float())


def spoil(world, example: int, value: float) -> None:
    """Let one number of one example's activations be `value`."""
    block, embed = world.host.network.block, world.host.network.embed
    seen = {}
    embed.register_forward_hook(lambda *a: seen.update(x=a[2]))

    def change(x):
        x = x.clone()
        x[..., 2] = torch.where(seen["x"][..., 0] == example, value, x[..., 2])
        return x

    block.spoil = change


def test_fp16_overflow_is_refused_and_nothing_is_finished(world):
    example = int(world.dataset.ids("train")[5])
    spoil(world, example, 1e5)
    world.dtype = "fp16"
    site = "blocks.0.resid_post"
    with pytest.raises(DataError, match=rf"store\.dtype=fp16.*1e\+05 at example {example}.*bf16"):
        world.write(site)
    assert not is_complete(world.folder / "store" / f"{site}-all.p0")
    world.dtype = "bf16"
    folder = world.write(site, folder="other")[0]
    assert float(joined(folder, "train")["activations"].abs().max()) == pytest.approx(1e5, rel=0.01)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused_with_the_example(world, value):
    spoil(world, 23, value)
    with pytest.raises(DataError, match=r"blocks\.0\.resid_post: activation of example 23 is NaN"):
        world.write("blocks.0.resid_post")


def test_of_many_unreadable_examples_a_few_are_named(world, caplog):
    world.dataset.bad, world.max_bad = set(range(20)), 1
    world.write()
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert sum(line.startswith("unreadable example ") for line in said) == 5
    assert said[-1] == "20 unreadable examples so far"


def test_unreadable_examples_are_counted_and_named(world, caplog):
    world.dataset.bad = {4, 11, 12}
    world.max_bad = 3 / 60
    folder = world.write()[0]
    ids = {int(i) for split in SPLITS for i in joined(folder, split)["example_id"]}
    assert ids == set(range(60)) - {4, 11, 12}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sorted(bad["id"] for bad in manifest["unreadable"]) == [4, 11, 12]
    assert {bad["reason"] for bad in manifest["unreadable"]} == {"torn"}
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [
        f"unreadable example {bad['id']}: torn" for bad in manifest["unreadable"]
    ]
    world.max_bad = 2.9 / 60
    with pytest.raises(DataError, match=r"dataset\.max_bad=0\.0483333: 3 of 60 examples.*: torn"):
        world.write(folder="strict")


def test_a_window_without_a_readable_example_is_no_end(world):
    world.window_rows = 7  # One example a window.
    world.dataset.bad = {int(world.plan().examples("train", 0)[0])}
    world.max_bad = 0.1
    folder = world.write()[0]
    assert len(shards(folder, "train")[0]["activations"]) == 0
    store = ActivationStore(folder)
    seen = [len(rows.x) for rows in store.rows("train", 4)]
    assert sum(seen) == store.n_rows("train") and min(seen) > 0
    batch = next(store.shuffled(store.n_rows("train"), seed=0))
    assert len(batch.x) == store.n_rows("train")


def test_a_selection_that_keeps_no_token_is_refused(world):
    world.selection = TokenSelection("all", drop_positions=tuple(range(7)))
    with pytest.raises(DataError, match=r"site\.tokens=all: no token of the train split is left"):
        world.write()


@pytest.mark.parametrize(
    ("selection", "asked", "least"),
    [
        (TokenSelection("positions", positions=(0, 4, 4)), 2, 5),
        (TokenSelection("random_k", k=3), 3, 3),
    ],
)
def test_rows_that_shorter_examples_did_not_give_are_counted(
    world, caplog, selection, asked, least
):
    world.selection = selection
    store = ActivationStore(world.write()[0])
    n_found = store.n_rows("train") + store.n_rows("heldout")
    lengths = [world.dataset.length(i) for i in range(60)]
    given = {5: lambda n: 1 + (n >= 5), 3: lambda n: min(n, 3)}[least]
    assert n_found == sum(map(given, lengths))
    said = f"{60 * asked - n_found} of {60 * asked} rows of embed are not there"
    assert said in caplog.text
    caplog.clear()
    world.selection = TokenSelection("positions", positions=(0,))
    world.write(folder="first")
    assert "not there" not in caplog.text


@pytest.mark.parametrize("tokens", ["all", "last", "mean", "positions", "random_k"])
def test_batch_size_and_workers_change_no_byte(world, files_in, tokens):
    world.selection = TokenSelection(tokens, k=2, positions=(-1, 1))
    whole = files_in(world.write()[0])
    world.batch_size, world.workers = 3, 2
    assert files_in(world.write(folder="other")[0]) == whole


def test_sites_of_one_pass_cost_one_pass_and_a_later_one_joins_on_its_rows(world, files_in):
    world.host.sites()
    world.host.n_forward = 0
    both = world.write("embed", "blocks.0.resid_post")
    n_batches = world.host.n_forward
    alone = world.write("embed", folder="other")[0]
    assert world.host.n_forward == 2 * n_batches
    later = world.write("blocks.0.resid_post", folder="other")[0]
    assert files_in(alone) == files_in(both[0])
    assert files_in(later) == files_in(both[1])


def stop_at(monkeypatch, name: str, call: int, error: BaseException) -> None:
    """Let call number `call` of a function of `writer` fail."""
    real, calls = getattr(writer, name), iter(range(1000))

    def function(*arguments, **options):
        if next(calls) == call:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(writer, name, function)


@pytest.mark.parametrize("name", ["compute_window", "_write_window", "_finish"])
def test_a_write_that_stops_anywhere_goes_on_to_the_same_bytes(world, monkeypatch, files_in, name):
    sites = ("embed", "blocks.0.resid_post")
    world.host.sites()
    world.host.n_forward = 0
    whole = [files_in(folder) for folder in world.write(*sites)]
    n_forward = world.host.n_forward
    for call in range(2 if name == "_finish" else 4):
        with monkeypatch.context() as patch:
            stop_at(patch, name, call, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                world.write(*sites, folder=f"{name}{call}")
        done = world.folder / f"{name}{call}"
        world.host.n_forward = 0
        assert [files_in(folder) for folder in world.write(*sites, folder=done.name)] == whole
        if name == "_finish":
            assert world.host.n_forward == 0
        else:
            assert (world.host.n_forward < n_forward) == (call > 0)


def test_unreadable_examples_of_before_a_stop_still_count(world, monkeypatch):
    plan = world.plan()
    world.dataset.bad = {int(plan.examples("train", w)[0]) for w in (0, 1, 4)}
    world.max_bad = 2 / 60
    with monkeypatch.context() as patch:
        stop_at(patch, "compute_window", 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            world.write()
    with pytest.raises(DataError, match="3 of 60 examples are unreadable"):
        world.write()
    world.max_bad = 3 / 60
    folder = world.write()[0]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {bad["id"] for bad in manifest["unreadable"]} == world.dataset.bad


def test_a_full_disk_leaves_nothing_half_written(world, monkeypatch, files_in):
    whole = files_in(world.write()[0])
    import safetensors.torch

    real, calls = safetensors.torch.save_file, iter(range(1000))

    def save_file(tensors, path, metadata):
        if next(calls) == 2:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", save_file)
        with pytest.raises(OSError, match="No space left"):
            world.write(folder="full")
    folder = world.folder / "full" / "embed-all.p0"
    left = files_in(folder)
    shards = ["train-00000.safetensors", "train-00001.safetensors"]
    records = [".windows/train-00000.json", ".windows/train-00001.json"]
    assert sorted(left) == [*records, *shards]
    assert all(left[name] == whole[name] for name in shards)
    assert files_in(world.write(folder="full")[0]) == whole


def test_the_command_says_a_full_disk_in_one_line(in_process, monkeypatch, capsys, tmp_path):
    def write_tensors(path, *_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(files, "write_tensors", write_tensors)
    code = in_process("cache", "model=toy", "dataset.n_examples=100", "device=cpu")
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2
    assert line.startswith("sae-run cache: no space left on device") and "same command" in line
    written = [p for p in (tmp_path / "outputs").rglob("*") if p.is_file()]
    assert sorted(p.name for p in written if not p.name.endswith(".lock")) == ["store.json"]


WRITE_TOY = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from sae_runner.data.toy import ToyDataset
from sae_runner.models.toy import ToyHost
from sae_runner.site import TokenSelection
from sae_runner.store.window import WindowPlan
from sae_runner.store.writer import begin_store, write_selections

def write(folder, n, d, slow=0.0):
    dataset = ToyDataset(n_features=64, d=d, n_active=3.0, zipf=0.0, magnitude="uniform",
        correlation=0.0, noise_std=0.0, bias_norm=1.0, n_examples=n, heldout=0.1, seed=0)
    host = ToyHost("cpu", dataset)
    plan = WindowPlan.make(dataset, window_rows=1024, rows_per_example=1, seed=0)
    names = {"model": "toy", "dataset": "toy"}
    load = dataset.load
    dataset.load = lambda ids: time.sleep(slow) or load(ids)
    begin_store(Path(folder), host, dataset, {}, names, {})
    write_selections(Path(folder), host, dataset, list(host.sites().values()),
        TokenSelection("all"), plan, dtype="fp32", batch_size=512, workers=0, max_bad=0.0)
"""
# Processes that are forked before torch has a thread: to import it again for each would take long.
KILL = """
whole, killed = sys.argv[1:3]
write(whole + "-first", 12000, 128)
started = time.perf_counter()
write(whole, 12000, 128, slow=0.005)
seconds = time.perf_counter() - started
draw, kills, status = random.Random(int(sys.argv[3])), 0, 1
for attempt in range(100):
    child = os.fork()
    if child == 0:
        write(killed, 12000, 128, slow=0.005)
        os._exit(0)
    time.sleep(draw.uniform(0, 0.2) * seconds * (1 + attempt / 10))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    kills += 1
print("kills", kills, "status", status)
"""


def run_script(script: str, *words: str) -> list[int]:
    """The numbers in what a script prints."""
    done = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [int(number) for number in re.findall(r"\d+", done.stdout)]


def test_a_write_that_is_killed_again_and_again_ends_with_the_same_bytes(tmp_path, files_in):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    kills, status = run_script(WRITE_TOY + KILL, str(whole), str(killed), "0")
    assert kills >= 3 and status == 0
    assert files_in(killed) == files_in(whole)


PEAKS = """
import resource
from sae_runner.store.reader import ActivationStore

def peak():
    print("KiB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

write(sys.argv[1], int(sys.argv[2]), 1024)
peak()
store = ActivationStore(Path(sys.argv[1]) / "activations-all.p0", mix_rows=4096)
batches = store.shuffled(512, 0)
for _ in range(store.n_rows("train") // 512):
    next(batches)
peak()
"""


def test_ten_times_the_data_takes_no_more_memory_to_write_or_to_read(tmp_path):
    """Windows of 4 MiB; 16 and 160 MB in all. A process has one peak, so each size has its own."""
    small, large = (run_script(WRITE_TOY + PEAKS, str(tmp_path / n), n) for n in ("4000", "40000"))
    written, read = ((b - a) / 1024 for a, b in zip(small, large, strict=True))
    assert written < 40 and read < 40, (small, large)
