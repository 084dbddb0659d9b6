"""Train, measure and explore sparse autoencoders from composable configs.

The public Python face is three functions, loaded only when asked for (none of them costs an
import of torch before it is called):

    load_sae(path)     a trained SAE, ready for raw activations
    open_store(path)   cached activations, readable row by row or shuffled
    load_report(path)  the validated report.json of a run
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_runner.checkpoint import load_sae
    from sae_runner.report.schema import load_report
    from sae_runner.store.reader import open_store

__all__ = ["load_report", "load_sae", "open_store"]
__version__ = "0.1.0"

_HOMES = {
    "load_report": "sae_runner.report.schema",
    "load_sae": "sae_runner.checkpoint",
    "open_store": "sae_runner.store.reader",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sae_runner' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
