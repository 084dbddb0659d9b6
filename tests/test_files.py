import errno
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae_runner import files
from sae_runner.errors import InputError
from sae_runner.explain import explain

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


# -- Whole or absent -----------------------------------------------------------------------------


def names(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_a_file_and_its_folders_appear_when_they_are_whole(tmp_path):
    path = tmp_path / "a" / "b.txt"
    with files.atomic(path) as temporary:
        temporary.write_text("new")
        assert not path.exists() and temporary.suffix == ".txt"
    assert path.read_text() == "new" and names(tmp_path) == ["a", "a/b.txt"]
    files.write_json(path, {"x": 1})
    assert json.loads(path.read_text()) == {"x": 1} and names(tmp_path) == ["a", "a/b.txt"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
@pytest.mark.parametrize("old", ["old", None])
def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path, error, old):
    path = tmp_path / "file"
    if old:
        path.write_text(old)

    def write():
        with files.atomic(path) as temporary:
            temporary.write_text("half")
            (temporary.parent / ".tmpX12").write_text("what a library keeps meanwhile")
            raise error

    with pytest.raises(type(error)):
        write()
    assert names(tmp_path) == (["file"] if old else [])
    assert not old or path.read_text() == old


def test_a_folder_replaces_a_folder_whole(tmp_path):
    path = tmp_path / "step_1"
    for content in ("old", "new"):
        with files.atomic(path) as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
    assert names(tmp_path) == ["step_1", "step_1/new"]


def test_the_folder_that_was_there_comes_back_if_the_new_one_cannot_take_its_place(
    tmp_path, monkeypatch
):
    path = tmp_path / "step_1"
    path.mkdir()
    (path / "old").write_text("old")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), files.atomic(path) as temporary:
        temporary.mkdir()
    assert names(tmp_path) == ["step_1", "step_1/old"]


def test_everything_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Files and the folders that list them first, then the rename, then the folder it is in."""
    done = []
    flush, replace = files.flush, Path.replace
    monkeypatch.setattr(files, "flush", lambda p: done.append(p.name) or flush(p))
    monkeypatch.setattr(Path, "replace", lambda p, to: done.append("rename") or replace(p, to))
    with files.atomic(tmp_path / "out" / "step_1") as temporary:
        (temporary / "state").mkdir(parents=True)
        (temporary / "state" / "x").write_text("x")
    assert sorted(done[:3]) == ["state", "step_1", "x"] and done[3:] == ["rename", "out"]


def test_json_that_is_none_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "x.json", {"x": float("nan")})
    assert names(tmp_path) == []


def test_tensors_of_any_layout_are_written_by_value(tmp_path):
    x = torch.arange(6.0).view(2, 3)
    files.write_tensors(tmp_path / "x.safetensors", {"t": x.T, "x": x, "none": x[:0]})
    found = load_file(tmp_path / "x.safetensors")
    assert torch.equal(found["t"], x.T) and torch.equal(found["x"], x)
    assert found["none"].shape == (0, 3)
    content = (tmp_path / "x.safetensors").read_bytes()
    files.write_tensors(tmp_path / "y.safetensors", {"none": x[:0], "x": x, "t": x.T})
    assert (tmp_path / "y.safetensors").read_bytes() == content
    assert files.sha256(tmp_path / "x.safetensors") == hashlib.sha256(content).hexdigest()


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path):
    for name in (".a.json.12.partial/a.json", ".b.13.partial/.tmpX", "a.json", ".a.json.lock"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    files.remove_partials(tmp_path)
    assert names(tmp_path) == [".a.json.lock", "a.json"]


def test_what_the_system_refuses_is_one_line(tmp_path, monkeypatch):
    import safetensors.torch
    from safetensors import SafetensorError

    def save_file(*_):
        raise SafetensorError("Error while serializing: I/O error: File too large (os error 27)")

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    path = tmp_path / "x.safetensors"
    with pytest.raises(OSError, match="File too large") as error:
        files.write_tensors(path, {"x": torch.zeros(2)})
    assert explain(error.value) == f"cannot write {path}: File too large; set outputs=DIR"
    assert names(tmp_path) == []


# -- Space ---------------------------------------------------------------------------------------


def test_what_will_not_fit_is_refused_with_both_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda _: 10**9)
    files.require_space(tmp_path / "out", 936 * 10**6, "store needs")
    line = r"store needs 940 MB and 64\.0 MB in reserve, 1\.0 GB free in .*outputs=DIR"
    with pytest.raises(InputError, match=line):
        files.require_space(tmp_path / "out", 940 * 10**6, "store needs")


def test_outputs_that_cannot_be_written_are_refused_before_anything(tmp_path):
    files.require_writable(tmp_path / "not" / "yet")
    assert names(tmp_path) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"outputs=.*file/out: cannot write in .*Not a directory"):
        files.require_writable(tmp_path / "file" / "out")
