"""Steps that are recorded once and then started as a whole: CUDA graphs.

A small step is bound by Python: at 12,288 latents and 4,096 rows its kernels take a third of the
time in which they are started one by one. A recorded step does the same work in the same memory,
so what is done, and to how much, may hang on no number that the device has to be asked for.
"""

import gc
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float32
from torch import Tensor

from sae_runner.errors import ConfigError
from sae_runner.kernels.choice import fused, ops_on
from sae_runner.saes.base import SAE
from sae_runner.training.options import TrainOptions

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
        why = f"{device.type} has no CUDA graphs; set it to false"
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
        device: which need not be the current one.
    """

    def __init__(self, work: Callable[[], Found], device: torch.device) -> None:
        gc.collect()  # What is left of an earlier step would tie the record to its stream.
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # Other threads read ahead meanwhile, and may allocate.
        recording = torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local")
        with torch.cuda.device(device), recording:
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
        self.n_taken = 0
        self.x: Tensor | None = None
        self.graph: Callable[[], Found] | None = None

    def __call__(self, take: Callable[[Tensor], Found], x: Tensor) -> Found:
        """`take(x)`; a record is of the first `take`, whose work all others do.

        Raises:
            ConfigError: the step cannot be recorded.
        """
        if self.x is None or (x.shape, x.dtype) != (self.x.shape, self.x.dtype):
            self.x, self.graph, self.n_taken = x.clone(), None, 0
        self.n_taken += 1
        if self.n_taken <= WARM_UP:
            return take(x)
        self.x.copy_(x)
        if self.graph is None:
            self.graph = self._record(take, self.x)
        return self.graph()

    def _record(self, take: Callable[[Tensor], Found], x: Tensor) -> Callable[[], Found]:
        try:
            found = CudaGraph(lambda: take(x), x.device)
        except RuntimeError as error:  # After which a device's streams are not to be relied on.
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"trainer.cuda_graph=true: the step cannot be recorded ({reason}); set it to false"
            ) from None
        self.kept = self.held()
        return found
