import os
import signal
import threading

import pytest

from sae_runner.errors import Interrupted
from sae_runner.signals import SIGNALS, StopRequest, deferred, raise_on_signals


@pytest.fixture(autouse=True)
def _handlers():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    signal.sigtimedwait([], 0.01)  # Let the handler run.


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_raises_with_its_exit_code(number, code):
    raise_on_signals()
    with pytest.raises(Interrupted, match=f"{number.name}: type the same command") as error:
        send(number)
    assert error.value.exit_code == code


@pytest.mark.parametrize("number", SIGNALS)
def test_inside_the_block_the_first_signal_asks_and_the_second_raises(number):
    raise_on_signals()
    outside = signal.getsignal(number)
    with deferred() as stop:
        assert not stop
        send(number)
        assert stop and stop.signum == number
        with pytest.raises(Interrupted):
            send(signal.SIGTERM)
    assert signal.getsignal(number) is outside
    with pytest.raises(Interrupted, match=f"by {number.name}: stopped at step 3"):
        stop.interrupt("stopped at step 3")


def test_handlers_come_back_after_an_error():
    raise_on_signals()
    outside = {number: signal.getsignal(number) for number in SIGNALS}
    with pytest.raises(KeyError), deferred():
        raise KeyError
    assert {number: signal.getsignal(number) for number in SIGNALS} == outside


def test_outside_the_main_thread_nothing_is_deferred():
    found: list[StopRequest] = []

    def work() -> None:
        with deferred() as stop:
            found.append(stop)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(found) == 1 and not found[0]
