"""Steps that are recorded once: the same bits as steps that are taken one kernel at a time.

Without a CUDA device the kernels run in Triton's interpreter, in a process of its own that runs
this file again, and `Tape` stands for the graph: it does once more, with the same tensors, what
PyTorch and the kernels were asked to do, and refuses what would have to wait for a device.
"""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sae_runner.config import preset
from sae_runner.errors import ConfigError
from sae_runner.kernels import choice, selection, triton_ops
from sae_runner.training import recording
from sae_runner.training.recording import Recorded

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not triton_ops.available(), reason="no CUDA device"),
]
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=on_gpu)]
DEAD = "sae/dead_latents"
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "is_nonzero"}


@pytest.mark.parametrize("case", ["fp32", pytest.param("screened", marks=pytest.mark.slow)])
def test_in_the_interpreter(case):
    pytest.importorskip("triton")
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-k", f"recorded and {case}-", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout[-3000:]
    assert " passed" in finished.stdout and "skipped" not in finished.stdout.splitlines()[-1]


class Tape(TorchDispatchMode):
    """A graph on a CPU: the first call is the recorded one itself, which was done already."""

    def __init__(self, work, device):
        super().__init__()
        self.calls, self.launching, self.launch = [], False, triton_ops._launch
        triton_ops._launch = self.launched
        try:
            with self:
                self.found = work()
        finally:
            triton_ops._launch = self.launch
        self.is_done = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.launching or func.namespace == "profiler":
            return func(*args, **kwargs)
        assert func.overloadpacket.__name__ not in WAITS, f"{func} waits for the device"
        out = func(*args, **kwargs)
        results = [] if func._schema.is_mutable else [out] if torch.is_tensor(out) else out
        # Aliases: a result may be squeezed where it lies.
        self.calls.append((func, args, kwargs, [result.detach() for result in results]))
        return out

    def launched(self, kernel, grid, *tensors, **meta):
        self.calls.append((kernel, grid, tensors, meta))
        self.launching = True
        self.launch(kernel, grid, *tensors, **meta)
        self.launching = False

    @torch.no_grad()
    def __call__(self):
        if not self.is_done:
            for call in self.calls:
                self.again(*call)
        self.is_done = False
        return self.found

    def again(self, what, first, second, third):
        if not isinstance(what, torch._ops.OpOverload):
            self.launch(what, first, *second, **third)
            return
        found = what(*first, **second)
        found = [found] if torch.is_tensor(found) else found
        for old, new in zip(third, found if third else [], strict=True):
            assert old.shape == new.shape
            if old.data_ptr() != new.data_ptr():  # Else a view of what is up to date.
                old.copy_(new)


@pytest.fixture
def recordable(monkeypatch, trainer):
    """A trainer that records, on the device at hand."""

    def make(name, *, sae, **options):
        # Each step at another learning rate; the last is logged, and so taken anew.
        options = {"batch_size": 8, "log_every": 100, "lr_warmup": 0.8} | options
        return trainer("topk", name, sae=sae, cuda_graph=True, **options)

    if INTERPRETED:
        monkeypatch.setattr(choice, "ops_on", lambda device: triton_ops)
        monkeypatch.setattr(selection, "beside", lambda device: 0)
        monkeypatch.setattr(recording, "CudaGraph", Tape)
    return make


def trained(trainer, monkeypatch, *, records):
    """Its weights, moments and losses, recorded from the second step on or never."""
    monkeypatch.setattr(recording, "WARM_UP", 1 if records else 10**9)
    for batch in trainer.batches():
        trainer.advance(batch)
    losses = (trainer.run_dir / "metrics.jsonl").read_text()
    state = [t for p in trainer.sae.parameters() for t in trainer.optimizer.state[p].values()]
    return [*trainer.sae.parameters(), *state, trainer.dead.rows_since_fired], losses


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("sae", "options"),
    [
        (
            {"d_sae": 12, "k": 2},
            # AuxK asks the device, to find no dead.
            {"n_tokens": 32, "precision": "fp32", "dead_latents": preset(DEAD, "auxk")},
        ),
        (
            # Wide enough to be screened.
            {"d_sae": 72, "k": 1, "decoder_norm": "free", "input_scaling": "layer_norm"},
            {
                "n_tokens": 48,
                "precision": "screened",
                "clip_grad_norm": None,
                "dead_window": 8,
                "dead_latents": preset(DEAD, "resample") | {"at": [0.5], "encoder_norm": 5.0},
            },
        ),
    ],
    ids=["fp32", "screened"],
)
def test_step_recorded(recordable, monkeypatch, device, sae, options):
    one, other = (recordable(name, sae=sae, device=device, **options) for name in ("one", "other"))
    wanted, of_one = trained(one, monkeypatch, records=False)
    found, of_other = trained(other, monkeypatch, records=True)
    assert other.recorded.graph is not None and one.recorded.graph is None
    assert of_one == of_other
    for a, b in zip(wanted, found, strict=True):
        assert torch.equal(a, b)


class Again:
    """A graph that does its work anew."""

    def __init__(self, work, device):
        self.work, self.found = work, None

    def __call__(self):
        return self.work()


class Noting:
    """Notes which steps are to be recorded."""

    def __init__(self, recorded, asked, trainer):
        self.recorded, self.asked, self.trainer = recorded, asked, trainer
        self.lr = recorded.lr

    def __call__(self, take, x):
        self.asked.append(self.trainer.step)
        return self.recorded(take, x)


@pytest.fixture
def recorded(monkeypatch):
    """Steps that say what they were given, and of what there is a record."""
    monkeypatch.setattr(recording, "CudaGraph", Again)
    return Recorded(lambda: ["buffer"], torch.device("cpu"))


def test_the_fourth_step_of_a_shape_is_recorded(recorded):
    seen = []

    def take(x):
        seen.append(x)
        return x.sum().item()

    given = [torch.full((2, 3), float(i)) for i in range(6)]
    assert [recorded(take, x) for x in given] == [6.0 * i for i in range(6)]
    assert [x is y for x, y in zip(seen, given, strict=True)] == 3 * [True] + 3 * [False]
    assert all(x is recorded.x for x in seen[3:])  # In the memory of the record.
    assert recorded.kept == ["buffer"]
    assert recorded(take, torch.ones(1, 3)) == 3.0  # Another shape begins anew.
    assert recorded.graph is None
    assert recorded(take, torch.ones(1, 3).double()) == 3.0
    assert recorded.x.dtype == torch.float64


def test_rows_of_the_caller_are_left_alone(recorded):
    given = [torch.full((2, 3), float(i)) for i in range(6)]
    for x in given:
        recorded(lambda x: x.sum(), x)
    assert [float(x[0, 0]) for x in given] == [0, 1, 2, 3, 4, 5]


def test_what_cannot_be_recorded_ends_in_one_line(recorded, monkeypatch):
    def refuse(work, device):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(recording, "CudaGraph", refuse)
    found = [recorded(lambda x: x.sum().item(), torch.full((2,), float(i))) for i in range(3)]
    assert found == [0, 2, 4]
    with pytest.raises(ConfigError) as caught:
        recorded(lambda x: x.sum().item(), torch.zeros(2))
    assert str(caught.value) == (
        "trainer.cuda_graph=true: the step cannot be recorded (operation not permitted when stream "
        "is capturing); set it to false"
    )


@pytest.mark.parametrize(
    ("kind", "sae_options", "changes", "runs_the_model", "said"),
    [
        ("topk", {"k_start": 8, "k_anneal": 0.5}, {}, False, "set it to null"),
        ("batch_topk", {}, {}, False, "hangs on the batch; set it to false"),
        ("relu", {}, {}, False, "hangs on the batch"),
        ("topk", {}, {"micro_batch_size": 16}, False, "trainer.micro_batch_size"),
        ("topk", {}, {"precision": "bf16"}, False, "use auto, screened or fp32"),
        ("topk", {}, {}, True, "trainer/objective runs the model"),
    ],
)
def test_what_is_refused(
    sae, options, monkeypatch, kind, sae_options, changes, runs_the_model, said
):
    monkeypatch.setattr(recording, "ops_on", lambda device: triton_ops)
    cuda, made = torch.device("cuda"), sae(kind, **sae_options)
    wanted = options(cuda_graph=True, **changes)
    with pytest.raises(ConfigError, match=r"^trainer\.cuda_graph=true: ") as caught:
        recording.check(wanted, made, cuda, runs_the_model=runs_the_model)
    assert said in str(caught.value)
    off = options(cuda_graph=False, **changes)
    recording.check(off, made, cuda, runs_the_model=runs_the_model)
    recording.check(options(cuda_graph=True), sae("topk"), cuda, runs_the_model=False)


def test_needs_a_device_with_triton(sae, options, monkeypatch):
    wanted = options(cuda_graph=True)
    with pytest.raises(ConfigError, match="cpu has no CUDA graphs; set it to false"):
        recording.check(wanted, sae("topk"), torch.device("cpu"), runs_the_model=False)
    monkeypatch.setattr(triton_ops, "available", lambda: False)
    with pytest.raises(ConfigError, match="takes Triton"):
        recording.check(wanted, sae("topk"), torch.device("cuda"), runs_the_model=False)


@pytest.mark.parametrize("strategy", ["auxk", "ghost_grads", "pre_act", "none"])
def test_steps_in_which_the_dead_add_something_are_not_recorded(trainer, monkeypatch, strategy):
    """On a CPU, with records that do their work anew: which steps are taken how."""
    monkeypatch.setattr(recording, "CudaGraph", Again)
    monkeypatch.setattr(recording, "WARM_UP", 0)
    made = trainer(
        "jump_relu" if strategy == "pre_act" else "topk", log_every=100, dead_window=10**9,
        dead_latents=preset(DEAD, strategy), cuda_graph=True,
    )  # fmt: skip
    asked, recorded = [], made.recorded
    monkeypatch.setattr(made, "recorded", Noting(recorded, asked, made))
    for batch in made.batches():
        if made.step >= 4:
            made.dead.rows_since_fired[0] = 10**9
        made.advance(batch)
    expected = {"none": range(19), "pre_act": []}.get(strategy, range(4))
    assert asked == list(expected)  # The twentieth is logged.
