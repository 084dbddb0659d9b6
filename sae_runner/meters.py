"""What the operating system says of this process."""

import resource
import sys


def peak_rss_bytes() -> int:
    """The most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Bytes on macOS, else kilobytes.


def peak_rss_mib() -> float:
    """The same in MiB, as reports say it."""
    return round(peak_rss_bytes() / 2**20, 1)
