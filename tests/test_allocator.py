"""Large blocks stay with the process when they are freed, unless the user says otherwise."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes
from sae_runner.allocator import SETTINGS, keep_pages
kept = keep_pages()
library = ctypes.CDLL(None)
library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
n = 64 * 2**20
def held():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
before = held()
block = library.malloc(n)
ctypes.memset(block, 1, n)
library.free(block)
print(kept, held() - before > n / 2)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
@pytest.mark.parametrize(
    ("own", "expected"), [({}, "True True"), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, "False False")]
)
def test_a_freed_block_stays(own, expected):
    if not hasattr(os, "confstr") or "glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""):
        pytest.skip("another C library")
    environment = {k: v for k, v in os.environ.items() if "MALLOC" not in k} | own
    said = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, check=True
    )
    assert said.stdout.strip() == expected
