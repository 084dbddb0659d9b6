"""Folders as other libraries write them, made here from random weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interchange_folders import D_IN, D_SAE, N, draw
from sae_fixtures import build
from safetensors.torch import save_file

from sae_runner.saes.base import SAE
from sae_runner.statistics import ActivationStats


@pytest.fixture
def x() -> torch.Tensor:
    return draw(N, D_IN, seed=99) + 0.5


@pytest.fixture
def trained(x: torch.Tensor) -> Callable[..., SAE]:
    """`trained("topk", k=3)`: folded, as a checkpoint holds it, with no weight at its start."""

    def trained(kind: str, **options: Any) -> SAE:
        sae = build(kind, D_IN, D_SAE, **options)
        norms = x.norm(dim=1)
        stats = ActivationStats(x.mean(0), float(norms.mean()), float(norms.square().mean()), x)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            sae.initialise(stats, generator)
            for name, parameter in sae.named_parameters():
                noise = 0.2 * torch.randn(parameter.shape, generator=generator)
                parameter += noise.abs() if name in ("threshold", "mixture") else noise
        sae.after_step()
        if "threshold" in dict(sae.named_buffers()):
            sae.threshold.fill_(0.3)
        return sae.fold().eval().requires_grad_(False)

    return trained


@pytest.fixture
def saelens_folder(tmp_path: Path) -> Callable[..., Path]:
    """`saelens_folder(tensors, architecture="standard", …)`; a field of None is left out."""

    def write(tensors: dict[str, torch.Tensor], **fields: Any) -> Path:
        cfg = {
            "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu",
            "apply_b_dec_to_input": True, "normalize_activations": "none",
            "reshape_activations": "none", "metadata": {"sae_lens_version": "6.54.12"}, **fields,
        }  # fmt: skip
        folder = tmp_path / "saelens"
        folder.mkdir(exist_ok=True)
        (folder / "cfg.json").write_text(
            json.dumps({k: v for k, v in cfg.items() if v is not None})
        )
        save_file(
            {k: v.contiguous() for k, v in tensors.items()}, folder / "sae_weights.safetensors"
        )
        return folder

    return write


@pytest.fixture
def dictionary_folder(tmp_path: Path) -> Callable[..., Path]:
    """`dictionary_folder("AutoEncoderTopK", state, k=3)`."""

    def write(name: str, state: dict[str, Any], **trainer: Any) -> Path:
        known = {
            "dict_class": name, "trainer_class": "Any", "activation_dim": D_IN,
            "dict_size": D_SAE, "lr": 1e-4, "steps": 10, "seed": 0, "device": "cpu", "layer": 3,
            "lm_name": "pythia", "wandb_name": "", "submodule_name": "resid_post_layer_3",
            **trainer,
        }  # fmt: skip
        folder = tmp_path / "dictionary"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"trainer": known, "buffer": {"io": "out"}}))
        torch.save(state, folder / "ae.pt")
        return folder

    return write


@pytest.fixture
def sparsify_folder(tmp_path: Path) -> Callable[..., Path]:
    def write(**fields: Any) -> Path:
        cfg = {
            "activation": "topk", "expansion_factor": 32, "normalize_decoder": True,
            "num_latents": D_SAE, "k": 3, "multi_topk": False, "skip_connection": False,
            "transcode": False, "d_in": D_IN, **fields,
        }  # fmt: skip
        folder = tmp_path / "layers.3"
        folder.mkdir(exist_ok=True)
        (folder / "cfg.json").write_text(json.dumps(cfg))
        tensors = {
            "encoder.weight": draw(D_SAE, D_IN), "encoder.bias": draw(D_SAE, seed=1),
            "W_dec": draw(D_SAE, D_IN, seed=2), "b_dec": draw(D_IN, seed=3),
        }  # fmt: skip
        save_file(tensors, folder / "sae.safetensors")
        return folder

    return write
