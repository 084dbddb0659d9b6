import pytest
import torch
from torch import nn

from sae_runner.commands import memory
from sae_runner.commands.memory import Part
from sae_runner.commands.pipeline import Pipeline
from sae_runner.kernels.choice import using
from sae_runner.models.base import HookedModel, Inputs, Tap


class Host(HookedModel):
    """4 numbers to 100 to 8, for every token; then a head that no site needs."""

    modality = "text"

    def __init__(self):
        super().__init__()
        self.device = torch.device("meta")
        with self.device:
            self.network = nn.Sequential(
                nn.Embedding(10, 4), nn.Linear(4, 100), nn.Linear(100, 8), nn.Linear(8, 50_000)
            )

    def forward(self, inputs):
        return self.network(inputs.tensors["tokens"])

    def taps(self):
        return {"embed": Tap("0"), "deep": Tap("2")}

    def probe(self, n):
        tokens = torch.zeros(n, 4, dtype=torch.int64, device="meta")
        return Inputs(torch.arange(n, device="meta"), {"tokens": tokens})

    prepare = fingerprint = describe = None


Host.__abstractmethods__ = frozenset()


def test_layers_on_the_way_to_a_site_count_and_later_ones_do_not():
    host = Host()
    weights, layer = memory.model_bytes(host, ["deep"], batch_size=32, context=64)
    assert weights == 4 * (10 * 4 + 4 * 100 + 100 + 100 * 8 + 8 + 8 * 50_000 + 50_000)
    assert layer == 3 * (32 * 64 * 100 * 4)
    assert memory.model_bytes(host, ["embed"], 32, 64)[1] == 3 * (32 * 64 * 4 * 4)
    assert not any(module._forward_hooks for module in host.network.modules())


@pytest.fixture
def parts(compose_job, small):
    def parts(*words, n_rows=10**9):
        job = compose_job("train", *small, *words)
        pipeline = Pipeline(job.cfg, job.choices)
        sae = pipeline.build_sae(16, device="meta")
        return {p.what: p for p in memory.training(pipeline, sae, n_rows)}

    return parts


def test_what_training_holds(parts):
    size = 4 * (2 * 16 * 128 + 16 + 128)
    found = parts("sae=relu")
    assert found["parameters"].n_bytes == found["gradients"].n_bytes == size
    assert found["Adam's moments"].n_bytes == 2 * size
    # Dense latents of a batch of 256, some copies of them.
    assert found["activations of a batch"].n_bytes >= 2 * 256 * 128 * 4
    assert found["rows mixed"].n_bytes >= 2**20 * 16 * 4
    assert found["batches read ahead"].n_bytes >= 4 * 256 * 16 * 4


def test_a_sparse_step_holds_no_dense_latents(parts):
    batch = "activations of a batch"
    wide = ("sae.expansion=null", "sae.d_sae=65536")
    dense, sparse = parts("sae=relu", *wide), parts("sae=topk", *wide)
    assert sparse[batch].n_bytes < dense[batch].n_bytes / 2.5
    for kernels in ("torch", "auto"):
        with using(kernels):
            whole, parted = parts("sae=topk"), parts("sae=topk", "trainer.micro_batch_size=64")
        assert whole["gradients"].n_bytes == 0
        assert parted["gradients"].n_bytes == whole["parameters"].n_bytes
    half = parts("sae=topk", "trainer.precision=screened")["copy of the encoder"]
    assert half.n_bytes == pytest.approx(2 * 16 * 128, rel=0.05)


def test_options_that_are_there_to_save_memory_do(parts):
    batch = "activations of a batch"
    parted = parts("sae=relu", "trainer.micro_batch_size=64")[batch]
    assert parted.n_bytes == parts("sae=relu")[batch].n_bytes / 4
    assert (
        parts("store.mix_rows=1024")["rows mixed"].n_bytes
        == parts(n_rows=1024)["rows mixed"].n_bytes
    )
    stream = ("store=stream", "store.mix_rows=100", "store.window_rows=100")
    mixed = parts(*stream, n_rows=1000)["rows mixed"]
    kept = parts(*stream, "store.keep_gb=1", n_rows=1000)["rows mixed"]
    assert kept.n_bytes == 10 * mixed.n_bytes and (mixed.where, kept.where) == ("host", "device")
    half = parts("store.dtype=fp16")["rows mixed"].n_bytes
    assert parts()["rows mixed"].n_bytes - half == 2**20 * 16 * 2
    assert "windows" in parts("store=stream", "store.window_rows=1000")


def test_windows_of_several_sites(compose_job, small):
    job = compose_job("train", *small)
    pipeline = Pipeline(job.cfg, job.choices)
    (info,) = pipeline.infos
    one = {p.what: p.n_bytes for p in memory.caching(pipeline, [info], 10**6)}
    two = {p.what: p.n_bytes for p in memory.caching(pipeline, [info, info], 10**6)}
    window = 1000 * (16 * 4 + 16)
    assert one["windows"] == 4 * window and two["windows"] == 6 * window
    last = {p.what: p.n_bytes for p in memory.caching(pipeline, [info], 500)}
    assert last["windows"] == 3 * window / 2


def test_host_and_device_are_told_apart(monkeypatch):
    parts = [Part("a", 3.21e9, "host"), Part("b", 7.05e9, "device"), Part("c", 1e6, "host")]
    monkeypatch.setattr(memory, "peak_rss_bytes", lambda: 10**9)
    assert memory.summary(parts, "cpu") == (
        "about 11 GB: b 7 GB, a 3.2 GB, libraries and data 1 GB"
    )
    assert memory.summary(parts, "cuda:0").startswith("about 4.2 GB and 7 GB on cuda:0: ")
    monkeypatch.setattr(memory, "free_memory", lambda: 4 * 10**9)
    monkeypatch.setattr(memory, "free_on", lambda device: 7 * 10**9 if "cuda" in device else None)
    assert memory.shortage("training", parts, "cuda:0") == [
        "training needs about 7 GB of memory of cuda:0, 7 GB free"
    ]
    assert memory.shortage("training", parts, "cpu") == [
        "training needs about 10 GB of memory, 4 GB free"
    ]
    assert memory.shortage("training", parts[2:], "cpu") == []
