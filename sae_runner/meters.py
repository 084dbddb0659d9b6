"""What the operating system says of this process and of the machine."""

import os
import resource
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def peak_rss_bytes() -> int:
    """The most memory that this process has held so far.

    Linux says it in STATUS: what getrusage gives there begins with the peak of the process that
    started this one.
    """
    if STATUS.is_file():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Bytes on macOS, else kilobytes.


def physical_bytes() -> int | None:
    """Memory of the machine, where the system tells."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def peak_rss_mib() -> float:
    """The same in MiB, as reports say it."""
    return round(peak_rss_bytes() / 2**20, 1)
