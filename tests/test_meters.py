import ast
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sae_runner import meters


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_the_peak_is_in_the_same_unit_on_every_system(monkeypatch, platform, unit):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(meters, "STATUS", Path("/there/is/none"))
    monkeypatch.setattr(
        resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=300 * 2**20 // unit)
    )
    assert meters.peak_rss_bytes() == 300 * 2**20
    assert meters.peak_rss_mib() == 300.0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_it_is_what_the_process_held_at_its_peak():
    held = np.ones(2**23)
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    assert meters.peak_rss_bytes() == pytest.approx(int(line.split()[1]) * 1024, rel=0.05)
    assert meters.peak_rss_bytes() > held.nbytes


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_it_is_not_the_peak_of_who_started_the_process():
    held = np.ones(2**25)
    code = "from sae_runner.meters import peak_rss_bytes; print(peak_rss_bytes())"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert int(done.stdout) < held.nbytes


def test_nothing_else_asks_the_system():
    package = Path(meters.__file__).parent
    for path in package.rglob("*.py"):
        if path.name != "meters.py":
            names = {n.attr for n in ast.walk(ast.parse(path.read_text()))
                     if isinstance(n, ast.Attribute)}  # fmt: skip
            assert "ru_maxrss" not in names, path
