"""Steps that are recorded once and then started as a whole: CUDA graphs.

A small step is bound by Python: at 12,288 latents and 4,096 rows its kernels take a third of the
time in which they are started one by one. A recorded step does the same work in the same memory,
so what is done, and to how much, may hang on no number that the device has to be asked for.
"""

import gc
import logging
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float32
from torch import Tensor

from sae_runner.errors import ConfigError
from sae_runner.kernels.choice import fused, ops_on
from sae_runner.saes.base import SAE
from sae_runner.training.options import TrainOptions

log = logging.getLogger("sae_runner")
WARM_UP = 3
"""Steps that are taken one kernel at a time before: kernels are compiled, and memory kept."""
Found = TypeVar("Found")


def check(options: TrainOptions, sae: SAE, device: torch.device, *, runs_the_model: bool) -> None:
    """Refuse to record what cannot be recorded.

    Raises:
        ConfigError: there is no CUDA device with Triton, or a step's work hangs on its batch.
    """
    if not options.cuda_graph:
        return
    if device.type != "cuda":
        why = f"there are none on {device.type}; set it to false"
    elif not fused(ops_on(device), device):
        why = "it takes Triton, and a device of compute capability 8 or more; set it to false"
    elif sae.recording_refused:
        why = sae.recording_refused
    elif options.n_parts > 1:
        why = "trainer.micro_batch_size takes a batch in parts; set one of the two to null or false"
    elif options.half:
        why = "trainer.precision=bf16 is autocast; use auto, screened or fp32"
    elif runs_the_model:
        why = "trainer/objective runs the model in each step; use local"
    else:
        return
    raise ConfigError(f"trainer.cuda_graph=true: {why}")


class CudaGraph(Generic[Found]):
    """Work on a device, recorded without being done, and done whenever it is called.

    Args:
        work: returns tensors, which hold what the latest call found.
    """

    def __init__(self, work: Callable[[], Found]) -> None:
        gc.collect()  # What is left of an earlier step would tie the record to its stream.
        self.graph = torch.cuda.CUDAGraph()
        # Other threads read ahead meanwhile, and may allocate.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.found = work()

    def __call__(self) -> Found:
        """Do the work."""
        self.graph.replay()
        return self.found


class Recorded(Generic[Found]):
    """Takes steps on rows, from the fourth of one shape on by a record of it.

    Args:
        held: gives what a record writes to or reads besides its own, so that it is not freed.
        device: of the rows.
    """

    def __init__(self, held: Callable[[], Any], device: torch.device) -> None:
        self.held, self.kept = held, None
        self.lr: Float32[Tensor, ""] = torch.zeros((), device=device)
        """The learning rate, where records read it."""
        self.n_taken, self.failed = 0, False
        self.x: Tensor | None = None
        self.graph: CudaGraph[Found] | None = None

    def __call__(self, take: Callable[[Tensor], Found], x: Tensor) -> Found:
        """`take(x)`; a record is of the first `take`, whose work all others do."""
        if self.x is None or (x.shape, x.dtype) != (self.x.shape, self.x.dtype):
            self.x, self.graph, self.n_taken = x.clone(), None, 0
        self.n_taken += 1
        if self.failed or self.n_taken <= WARM_UP:
            return take(x)
        self.x.copy_(x)
        if self.graph is None and not self._record(take, self.x):
            return take(x)
        assert self.graph is not None
        return self.graph()

    def _record(self, take: Callable[[Tensor], Found], x: Tensor) -> bool:
        """Whether the step could be recorded; nothing is done by it."""
        try:
            self.graph = CudaGraph(lambda: take(x))
        except RuntimeError as error:
            self.failed = True
            reason = " ".join(str(error).split())[:200]
            log.warning("trainer.cuda_graph: goes on without, the step was refused: %s", reason)
            return False
        self.kept = self.held()
        return True
