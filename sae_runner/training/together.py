"""Several trainers over one stream of batches, each read, moved to the device and scaled once."""

from collections.abc import Callable, Sequence

from sae_runner import signals
from sae_runner.log import Progress
from sae_runner.saes.base import ScaledOnce
from sae_runner.store.activations import Batch
from sae_runner.store.prefetch import Prefetched
from sae_runner.training.trainer import Trainer


def run_together(trainers: Sequence[Trainer], failed: Callable[[Trainer, Exception], None]) -> None:
    """Train all to the end of their budgets; each ends with the bits it would have alone.

    They are trained on rows, and share device, store, batch size, order of the data and the
    position to start from. One that fails is handed to `failed` and left out; the others go on.

    Raises:
        Interrupted: a stop was asked for; the state of every one is saved.
    """
    longest = max(trainers, key=lambda trainer: trainer.options.n_steps)
    n_steps, size = longest.options.n_steps, longest.options.batch_size
    for trainer in trainers:
        if trainer is not longest:
            trainer.begin()
    once = ScaledOnce()
    for trainer in trainers:
        trainer.sae.share_scaling(once)
    batches = Prefetched(longest.batches(), longest.prefetch)
    going, step = list(trainers), longest.step
    progress = Progress(f"train {len(going)} SAEs", n_steps * size, "rows", done=step * size)
    try:
        with signals.deferred() as stop:
            while step < n_steps and going and not stop:
                batch = batches.next_unless(stop)
                if batch is None:
                    break
                assert isinstance(batch, Batch)
                batch = batch._replace(x=batch.x.to(longest.device))
                once.begin(batch.x)
                for trainer in list(going):
                    try:
                        trainer.advance(batch, batches.wait_s)
                    except Exception as error:
                        going.remove(trainer)
                        failed(trainer, error)
                going = [t for t in going if t.step < t.options.n_steps]
                step += 1
                progress.advance(size)
            if stop:
                for trainer in going:
                    try:
                        trainer.save(batches.wait_s)
                    except Exception as error:  # The others are saved all the same.
                        failed(trainer, error)
                stop.interrupt(f"stopped at step {step}; type the same command to go on")
    finally:
        once.begin(None)
        progress.close()
        batches.close()
