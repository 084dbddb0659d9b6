"""The C++ of native/ as a shared library: compiled at first use, kept, and loaded.

One call of the compiler without any header of PyTorch takes 3 s. Torch's own loader
needs ninja and 15 s, checks both at each start, and waits for ever on the lock of a killed compile.
There is no lock here: who compiles at the same time writes the same file, and gives it its name
when it is whole.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import threading
import time
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

MAIN = Path(__file__).with_name("native") / "native.cpp"
SOURCES = [MAIN, *sorted(MAIN.parent.glob("*.h"))]
FLAGS = (
    "-std=c++17", "-O3", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip
AVX512 = (
    "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma",
    "-mprefer-vector-width=512",
)  # fmt: skip
LEVELS = {
    "amx": (*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-int8"),
    "avx512": AVX512,
    "avx2": ("-mavx2", "-mfma"),
    "portable": (),
}  # fmt: skip
"""Instructions that may be used, by name. Never `native`: a cluster's machines share the file."""


def supported_levels() -> list[str]:
    """Which of LEVELS this processor has, the best first; ATEN_CPU_CAPABILITY lowers it."""
    found = torch.backends.cpu.get_cpu_capability()
    names = list(LEVELS)
    if not found.startswith("AVX512"):
        return names[names.index("avx2" if found.startswith("AVX") else "portable") :]
    tiles = torch.cpu._is_amx_tile_supported() and torch.cpu._is_avx512_bf16_supported()
    return names if tiles else names[1:]


def compiler() -> list[str]:
    """The command that CXX names, or the first compiler in PATH; empty without one."""
    named = shlex.split(os.environ.get("CXX", ""))
    candidates = [named] if named else [["c++"], ["g++"], ["clang++"]]
    return next((command for command in candidates if shutil.which(command[0])), [])


def library_path(level: str) -> Path:
    """Where the library for `level` lies: in torch's folder of extensions, named by its content."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "torch_extensions").expanduser()
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR", default), "sae_runner")
    content = [path.read_bytes() for path in SOURCES]
    content.append(" ".join(FLAGS + LEVELS[level]).encode())
    digest = hashlib.sha256(b"".join(content)).hexdigest()[:12]
    return folder / f"native-{platform.machine()}-{level}-{digest}.so"


def compile_library(level: str, path: Path) -> None:
    """Write the library for `level` to `path`.

    Raises:
        OSError: the compiler failed or took longer than five minutes, or nothing can be written.
    """
    command = compiler()
    path.parent.mkdir(parents=True, exist_ok=True)
    own = f"{platform.node()}.{os.getpid()}.{threading.get_ident()}"
    part = path.with_name(f"{path.name}.{own}")
    words = [*command, *FLAGS, *LEVELS[level], str(MAIN), "-o", str(part)]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, errors="replace", timeout=300, check=False
        )
        if done.returncode != 0:
            lines = done.stderr.splitlines() or [f"exit code {done.returncode}"]
            reason = next((line for line in lines if "error" in line), lines[0])
            raise OSError(f"{command[0]} failed: {reason}")
        part.replace(path)
    except subprocess.TimeoutExpired:
        raise OSError(f"{command[0]} took longer than 5 minutes") from None
    finally:
        part.unlink(missing_ok=True)


class UnknownInstructions(OSError):
    """The compiler is older than the processor."""


def load_level(level: str) -> ctypes.CDLL:
    """The library for `level`, compiled if need be.

    It uses the OpenMP that torch has loaded, so its threads are torch's.

    Raises:
        UnknownInstructions: the compiler refuses the flags of `amx`.
        OSError: it cannot be had.
    """
    path = library_path(level)
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # Not there, cut off, or linked against a newer libc than this machine's.
        command = compiler()
        if not command:
            raise OSError("no C++ compiler in PATH") from None
        nothing = [*command, *LEVELS[level], "-fsyntax-only", "-x", "c++", os.devnull]
        if level == "amx" and subprocess.run(nothing, capture_output=True, check=False).returncode:
            raise UnknownInstructions(f"{command[0]} compiles nothing for AMX") from None
        start = time.perf_counter()
        logger.info("compiling the native kernels (%s), once", level)
        compile_library(level, path)
        logger.info("compiled in %.1f s: %s", time.perf_counter() - start, path)
        return ctypes.CDLL(str(path))


@cache
def load_library() -> ctypes.CDLL | None:
    """The best library for this processor, or None; why not is logged, once."""
    for level in supported_levels():
        try:
            return load_level(level)
        except UnknownInstructions as error:
            logger.info("int8 is not multiplied: %s", error)
        except (OSError, RuntimeError, ValueError) as error:  # Also no home, or a CXX without end.
            reason = " ".join(str(error).split())
            logger.info("the native kernels are not used, PyTorch's operations are: %s", reason)
            break
    return None


def loaded_level() -> str | None:
    """The level of the library that is used."""
    library = load_library()
    paths = {str(library_path(level)): level for level in LEVELS}
    return None if library is None else paths.get(library._name)
