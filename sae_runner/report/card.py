"""The README.md beside exported weights: what they are, what they were measured at, how to load."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sae_runner.report.schema import flat_ci, flat_metrics
from sae_runner.report.table import MISSING, escaped, markdown_table, show_metric, show_value


def model_card(
    facts: Mapping[str, Any],
    report: Mapping[str, Any] | None,
    format_name: str,
    usage: str,
    figures: Sequence[str],
) -> str:
    """Markdown with the header that the hub reads.

    Args:
        facts: the checkpoint's cfg.json, or what stands for it.
        report: its report.json, if it was evaluated.
        format_name: the library whose form the weights have.
        usage: a line of Python that loads the FOLDER with that library.
        figures: paths of pictures, from the card.
    """
    parts = [header(facts, format_name), f"# {title(facts)}", facts_table(facts)]
    warnings = list((report or {}).get("warnings", []))
    parts += [f"**{escaped(line)}**" for line in warnings]
    parts += ["## Load", loading(usage)]
    if report:
        parts += ["## Metrics", metrics_table(report)]
    if figures:
        parts += ["## Figures", "\n\n".join(f"![{Path(path).stem}]({path})" for path in figures)]
    options = yaml.safe_dump(dict(facts["sae"]), sort_keys=True)
    parts += ["## Options of the SAE", f"```yaml\n{options}```"]
    return "\n\n".join(parts) + "\n"


def header(facts: Mapping[str, Any], format_name: str) -> str:
    """The block of YAML that the hub indexes."""
    tags = ["sparse-autoencoder", "interpretability", str(facts["sae"]["type"])]
    meta: dict[str, Any] = {"library_name": format_name.replace("_", "-"), "tags": tags}
    return f"---\n{yaml.safe_dump(meta, sort_keys=True)}---"


def title(facts: Mapping[str, Any]) -> str:
    """`Sparse autoencoder of gpt2 at blocks.3.resid_post`."""
    what = reads(facts)
    of = f" of {what['model']}" if what["model"] else ""
    at = f" at {what['site']}" if what["site"] else ""
    return escaped(f"Sparse autoencoder{of}{at}")


def reads(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Model, site, tokens and dataset by name, where they are known."""
    if "origin" in facts:
        origin = facts["origin"]
        return {"model": origin["model"], "site": origin["site"] or origin["hook"],
                "tokens": None, "dataset": origin["dataset"]}  # fmt: skip
    return {"model": (facts.get("model") or {}).get("name"), "site": facts.get("site"),
            "tokens": facts.get("tokens"),
            "dataset": (facts.get("dataset") or {}).get("name")}  # fmt: skip


def facts_table(facts: Mapping[str, Any]) -> str:
    """What was trained on what."""
    known = {
        **reads(facts),
        "architecture": facts["sae"]["type"],
        "d_in": facts["d_in"],
        "d_sae": facts["sae"]["d_sae"],
        "trained on rows": f"{facts['n_tokens']:,}" if facts.get("n_tokens") else None,
        "weights of the model": (facts.get("model") or {}).get("weights"),
        "SHA-256 of the checkpoint": facts["sha256"]["sae.safetensors"],
    }
    rows = [[key, str(value)] for key, value in known.items() if value is not None]
    return markdown_table(["", ""], rows)


def loading(usage: str) -> str:
    """How to load the folder with its own library, and with this one."""
    lines = [usage, 'sae_runner.load_sae("FOLDER")  # or hf:org/repo/path']
    return "```python\n" + "\n".join(lines) + "\n```"


def metrics_table(report: Mapping[str, Any]) -> str:
    """Every metric with its interval, and what it was measured on."""
    evaluators = report["evaluators"]
    metrics, ci = flat_metrics(evaluators), flat_ci(evaluators)
    rows = [[name, show_metric(value, ci.get(name))] for name, value in metrics.items()]
    data: dict[str, Any] = next((e["data"] for e in evaluators.values()), {})
    on = f"{show_value(data.get('name') or MISSING)} ({data.get('split') or MISSING})"
    n = data.get("n_tokens")
    measured = f"Measured on {f'{n:,} ' if n else ''}rows of {on}; ± is half the 95% interval."
    judged = [
        [entry["metric"], entry["verdict"], show_number(entry["measured"]), entry["source"] or ""]
        for entry in report["expected"]
    ]
    text = [escaped(measured), markdown_table(["metric", "value"], rows)]
    if judged:
        text.append(markdown_table(["published metric", "verdict", "measured", "source"], judged))
    return "\n\n".join(text)


def show_number(value: float | int | None) -> str:
    """A measured value, or that there is none."""
    return MISSING if value is None else show_metric(value)
