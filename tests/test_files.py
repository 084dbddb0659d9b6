import os
import subprocess
import sys
import time

import pytest

from sae_runner import files
from sae_runner.errors import InputError

HOLD = """
import sys, time
from pathlib import Path
from sae_runner import files
with files.locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path/thing until it is told to let go."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "thing")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    yield process
    process.stdin.close()
    process.wait(10)
    process.stdout.close()


def test_a_lock_that_may_not_be_waited_for_names_its_holder(tmp_path, holder):
    with (
        pytest.raises(InputError, match=f"thing is in use by process {holder.pid}"),
        files.locked(tmp_path / "thing", wait=False),
    ):
        raise AssertionError("two hold one lock")
    assert files.is_locked(tmp_path / "thing")


def test_a_lock_is_free_once_its_holder_is_gone(tmp_path, holder):
    holder.kill()
    holder.wait(10)
    assert not files.is_locked(tmp_path / "thing")
    with files.locked(tmp_path / "thing", wait=False):
        assert files.is_locked(tmp_path / "thing")
        assert files.lock_path(tmp_path / "thing").read_text() == str(os.getpid())
    assert not files.is_locked(tmp_path / "thing")
    assert not files.is_locked(tmp_path / "no" / "such" / "thing")


def test_looking_at_a_lock_leaves_no_file(tmp_path):
    assert not files.is_locked(tmp_path / "thing")
    assert not list(tmp_path.iterdir())


def test_whoever_waited_for_a_lock_that_was_removed_takes_the_new_one(tmp_path):
    """Else the waiter would hold a lock that nobody else can see."""
    path, lock = tmp_path / "thing", files.lock_path(tmp_path / "thing")
    with files.locked(path):
        waiter = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        deadline = time.monotonic() + 20
        while not waits(waiter.pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        lock.unlink()
    assert waiter.stdout.readline() == "held\n"
    assert lock.read_text() == str(waiter.pid)
    assert files.is_locked(path)
    waiter.communicate("\n", timeout=10)


def waits(pid: int) -> bool:
    """Whether the process stands in the kernel's queue for a file lock (else a little time)."""
    try:
        with open("/proc/locks") as file:
            return any("->" in line and f" {pid} " in line for line in file)
    except OSError:
        time.sleep(2)
        return True


def test_folder_bytes_counts_files_at_every_depth(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "one").write_bytes(b"x" * 10)
    (tmp_path / "a" / "b" / "two").write_bytes(b"x" * 7)
    assert files.folder_bytes(tmp_path) == 17
    assert files.folder_bytes(tmp_path / "one") == 10
    assert files.folder_bytes(tmp_path / "absent") == 0


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1_440_000, "1.4 MB"), (99_900_000, "99.9 MB"),
        (99_960_000, "100 MB"), (673_966_080_000, "674 GB"), (999_600_000_000, "1.0 TB"),
        (5.5e15, "5500 TB"),
    ],
)  # fmt: skip
def test_size_has_about_three_digits(n_bytes, text):
    assert files.size(n_bytes) == text
