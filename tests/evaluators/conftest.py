import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from host_fixtures import SITE, VOCAB, Host
from torch import Tensor

from sae_runner.config import preset
from sae_runner.data.base import Dataset, Example
from sae_runner.evaluators import EVALUATORS
from sae_runner.evaluators._shared_pass import InputPass
from sae_runner.evaluators._shared_pass import measure as run_passes
from sae_runner.evaluators.base import EvalContext, Findings, Rows, Setting
from sae_runner.models.base import Inputs
from sae_runner.report.schema import EVAL_SCHEMA, check_envelope
from sae_runner.saes.base import SAE, ActivationStats, Common, Latents, Loss, SAEOutput, TrainState
from sae_runner.site import TokenSelection

Measure = Callable[..., Findings]


class Given(SAE):
    """An SAE of a given decoder and scale; latents and reconstructions are given to the test."""

    kind = "given"

    def __init__(self, W_dec: Tensor, input_scale: float) -> None:
        common = {k: v for k, v in preset("sae", "topk").items() if k in Common.__annotations__}
        common |= {"d_sae": len(W_dec), "expansion": None, "input_scaling": "sqrt_d"}
        super().__init__(W_dec.shape[1], options={}, **common)
        self.W_dec.data, self.W_enc_rows.data = W_dec.clone(), W_dec.clone()
        self.input_scale.fill_(input_scale)

    def encode(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def loss(self, x: Tensor, state: TrainState) -> Loss:
        raise NotImplementedError

    def initialise(self, stats: ActivationStats, generator: torch.Generator) -> None:
        raise NotImplementedError


def assert_publishable(findings: Findings) -> None:
    """What the report's schema would refuse: NaN, infinities, nulls without a note."""
    envelope = {
        "schema": EVAL_SCHEMA, "evaluator": "e", "type": "e", "evaluator_version": "1",
        "axis": "both", "run_id": "r", "timestamp_utc": "t", "seed": 0, "host": {}, "site": {},
        "sae": {}, "data": {}, "config": {}, "metrics": findings.metrics, "ci": findings.ci,
        "notes": [note._asdict() for note in findings.notes], "series": findings.series,
        "artifacts": {}, "cost": {},
    }  # fmt: skip
    check_envelope(json.loads(json.dumps(envelope, allow_nan=False)))
    for column in findings.per_latent.values():
        assert np.isfinite(np.ma.compressed(column)).all()  # Nulls are masked.


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Measure:
    """Findings of an evaluator for given rows, fed in batches of one size in a given order.

    An evaluator that makes the latents dense, or keeps something of an earlier pass, fails.
    """
    monkeypatch.setattr(Latents, "dense", lambda _: pytest.fail("latents made dense"))

    def run(
        cfg: dict[str, Any],
        x: Any,
        x_hat: Any = None,
        latents: Any = None,
        *,
        example_id: Any = None,
        position: Any = None,
        batch: int = 10**9,
        order: Any = None,
        W_dec: Tensor | None = None,
        W_enc: Tensor | None = None,
        device: str = "cpu",
        input_scale: float = 1.0,
        seed: int = 0,
        examples: Any = None,
        **context: Any,
    ) -> Findings:
        x = torch.as_tensor(x)
        n, d_in = x.shape
        x_hat = x if x_hat is None else torch.as_tensor(x_hat)
        latents = torch.zeros(n, 3) if latents is None else torch.as_tensor(latents)
        ids = torch.arange(n) if example_id is None else torch.as_tensor(example_id)
        place = torch.zeros(n, dtype=torch.int64) if position is None else torch.as_tensor(position)
        order = torch.arange(n) if order is None else torch.as_tensor(order)
        W_dec = torch.ones(latents.shape[1], d_in) if W_dec is None else W_dec
        evaluator, sae = EVALUATORS.build(cfg), Given(W_dec, input_scale)
        if W_enc is not None:
            sae.W_enc_rows.data = W_enc.clone()
        examples = np.unique(ids.numpy()) if examples is None else examples
        announced = EvalContext(sae.to(device), n, examples, seed, **context)

        def rows(part: Tensor) -> Rows:
            sparse = Latents.from_dense(latents[part].to(device))
            on_device = [t.to(device) for t in (x[part], x_hat[part], ids[part], place[part])]
            return Rows(on_device[0], sparse, *on_device[1:], None)

        # A pass that was broken off leaves nothing behind.
        evaluator.start(announced)
        evaluator.update(rows(order[:3]))
        evaluator.start(announced)
        for part in order.split(batch):
            evaluator.update(rows(part))
        findings: Findings = evaluator.finish()
        assert_publishable(findings)
        return findings

    return run


class Mapped(Given):
    """An SAE whose reconstruction is a given function of x; no latent is ever active."""

    def __init__(self, change: Callable[[Tensor], Tensor], d: int) -> None:
        super().__init__(torch.ones(1, d), 1.0)
        self.change = change

    def forward(self, x: Tensor) -> SAEOutput:
        return SAEOutput(self.change(x), Latents.from_dense(x.new_zeros(len(x), 1)))


class Labels(Dataset):
    """Examples that a test makes itself, of the classes named here."""

    modality = "text"
    name = "made_up"

    def __init__(self, label_names: tuple[str, ...] | None = None) -> None:
        self.label_names = label_names

    def ids(self, split: Any) -> Any:
        raise NotImplementedError

    def load(self, ids: Any) -> list[Any]:
        return [Example(int(i), None) for i in ids]

    fingerprint = ids  # type: ignore[assignment]


@pytest.fixture
def measure_spliced(host: Host, selection: TokenSelection) -> Measure:
    """Findings of an evaluator of splices on a host, for an SAE or a function in its place."""

    def run(
        cfg: dict[str, Any],
        sae: SAE | Callable[[Tensor], Tensor],
        batches: list[Inputs],
        *,
        host: Host = host,
        site: str = SITE,
        selection: TokenSelection = selection,
        dataset: Dataset | None = None,
        mean: float = 0.25,
        target: str | None = None,
        seed: int = 0,
        n_latents: int = 1000,
    ) -> Findings:
        evaluator, info = EVALUATORS.build(cfg), host.sites()[site]
        dataset, goal = dataset or Labels(), host.sites()[target] if target else None
        setting = Setting(dataset, lambda: host, info, selection, goal)
        if not isinstance(sae, SAE):
            sae = Mapped(sae, info.d)
        evaluator.check(setting)
        with torch.no_grad():
            n_tokens = [host.record(b, [site])[site].shape[1] for b in batches]
        masks = [selection.mask(info, b, n) for b, n in zip(batches, n_tokens, strict=True)]
        rows = [b.ids[mask.any(1)] for b, mask in zip(batches, masks, strict=True)]
        ids = np.unique(torch.cat(rows).numpy())
        context = EvalContext(
            sae, len(ids), ids, seed, setting=setting, model=lambda: host, dataset=lambda: dataset,
            n_latents=n_latents,
        )  # fmt: skip
        found: list[Findings] = []
        average = torch.full((info.d,), mean, dtype=torch.float64)
        taken = InputPass(lambda: host, lambda: batches, len(ids), lambda: average)

        def keep(_: str, findings: Findings, __: dict[str, Any]) -> None:
            found.append(findings)

        failures = run_passes({"it": evaluator}, [], context, keep, inputs=taken)
        for error in failures.values():
            raise error
        assert_publishable(found[0])
        return found[0]

    return run


@pytest.fixture
def make_labels() -> type[Labels]:
    return Labels


@pytest.fixture
def labels_of_names() -> Labels:
    """As many classes as the host has logits."""
    return Labels(tuple(f"class_{i}" for i in range(VOCAB)))
