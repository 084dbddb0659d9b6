"""Findings of `autointerp`, kept as an evaluation keeps them."""

import json

from sae_runner.report.assemble import artifacts_of, write_findings


def keep(findings, folder, *, name="autointerp", host="a host", data="some data", **sae):
    """Write them below `folder`, which is returned, with the envelope that is read of them."""
    write_findings(folder, name, findings)
    envelope = {
        "type": "autointerp", "config": {"backend": {}}, "host": {"fingerprint": host},
        "data": {"fingerprint": data}, "sae": {"sha256": "an SAE", **sae},
        "artifacts": artifacts_of(name, findings),
    }  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(envelope))
    return folder
