import signal
from contextlib import contextmanager

import pytest

from sae_runner.log import Progress
from sae_runner.models import _fitting


@pytest.fixture
def stop_at(monkeypatch):
    """`with stop_at(7):` a real SIGTERM in the seventh step of a model's training."""

    @contextmanager
    def stop(step):
        class Stopping(Progress):
            def advance(self, n, note=""):
                super().advance(n, note)
                if self.done == step:
                    signal.raise_signal(signal.SIGTERM)

        with monkeypatch.context() as patch:
            patch.setattr(_fitting, "Progress", Stopping)
            yield

    return stop
