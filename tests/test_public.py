import subprocess
import sys

import pytest

import sae_runner


def test_exported_names_are_exact():
    assert sae_runner.__all__ == ["load_report", "load_sae", "open_store"]
    for name in sae_runner.__all__:
        assert callable(getattr(sae_runner, name))


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        sae_runner.no_such_name  # noqa: B018


def test_import_does_not_import_torch():
    code = "import sys, sae_runner; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
