"""What a SAELens folder says, as an SAE of ours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_runner.errors import StoreError
from sae_runner.interchange import _saelens_v5
from sae_runner.interchange._hooks import site_of
from sae_runner.interchange.base import (
    Origin,
    build,
    read_object,
    refuse_unknown,
    require,
    require_shapes,
)
from sae_runner.saes.base import SAE

DTYPES = ("float32", "float16", "bfloat16", "float64")
COMMON = frozenset({
    "architecture", "d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input",
    "normalize_activations", "reshape_activations", "metadata", "sae_lens_version",
    "finetuning_scaling_factor",
})  # fmt: skip
# What a checkpoint of training says besides: nothing of what the trained SAE computes.
TRAINING = frozenset({
    "decoder_init_norm", "l1_coefficient", "l1_warm_up_steps", "lp_norm", "l0_coefficient",
    "l0_warm_up_steps", "target_l0", "aux_loss_coefficient", "use_sparse_activations",
    "topk_threshold_lr", "matryoshka_widths", "use_matryoshka_aux_loss", "jumprelu_init_threshold",
    "jumprelu_bandwidth", "jumprelu_sparsity_loss_mode", "jumprelu_tanh_scale",
    "jumprelu_ste_to_input", "pre_act_loss_coefficient",
})  # fmt: skip
TOP_K = frozenset({"k", "rescale_acts_by_decoder_norm"})
FIELDS: dict[str, frozenset[str]] = {
    "standard": frozenset(), "gated": frozenset(), "jumprelu": frozenset(), "topk": TOP_K,
    "abstopk": TOP_K, "batchtopk": TOP_K, "matryoshka_batchtopk": TOP_K,
    "matching_pursuit": frozenset(
        {"residual_threshold", "max_iterations", "stop_on_duplicate_support"}
    ),
}  # fmt: skip
"""By architecture, what it computes with besides COMMON."""


def checked(cfg: dict[str, Any], path: Path) -> dict[str, Any]:
    """The configuration in the form of version 6, whatever version wrote it.

    Raises:
        StoreError: it says something that is unknown here or cannot be done.
    """
    metadata = cfg.get("metadata")
    version = cfg.get("sae_lens_version")
    version = version or (metadata.get("sae_lens_version") if isinstance(metadata, dict) else None)
    major = str(version or "0").split(".")[0]
    if not major.isdigit() or int(major) < 6:
        refuse_unknown(cfg, _saelens_v5.KNOWN, path)
        cfg = _saelens_v5.modernised(cfg, path)
    architecture = require(cfg, "architecture", str, path)
    if architecture not in FIELDS:
        known = ", ".join(FIELDS)
        raise StoreError(f"{path}: architecture={architecture!r} cannot be read; {known} can")
    refuse_unknown(cfg, COMMON | TRAINING | FIELDS[architecture], path)
    if str(cfg.get("dtype", "float32")).removeprefix("torch.") not in DTYPES:
        raise StoreError(f"{path}: dtype={cfg['dtype']!r} is unknown here")
    if (shape := cfg.get("reshape_activations", "none")) != "none":
        raise StoreError(
            f"{path}: reshape_activations={shape!r}: heads that lie apart cannot be joined here"
        )
    return cfg


def read_sae(cfg: Mapping[str, Any], found: dict[str, Tensor], folder: Path) -> SAE:
    """The SAE of a checked configuration and its weights, which are changed."""
    path = folder / "cfg.json"
    check_tensors(cfg, found, path)
    take_finetuning(cfg, found, path)
    if cfg.get("rescale_acts_by_decoder_norm", cfg["architecture"].endswith("batchtopk")):
        take_norms(found)
    scaling = take_normalisation(cfg, found, folder)
    kind, options = kind_of(cfg, found, path)
    options = {
        "apply_b_dec_to_input": cfg.get("apply_b_dec_to_input", True), "input_scaling": scaling,
        **options,
    }  # fmt: skip
    return build(kind, cfg["d_in"], found, path, **options)


def check_tensors(cfg: Mapping[str, Any], found: dict[str, Tensor], path: Path) -> None:
    """Refuse weights that are not those of the architecture; older names become newer ones."""
    architecture = cfg["architecture"]
    d_in, d_sae = (require(cfg, key, int, path) for key in ("d_in", "d_sae"))
    if architecture == "jumprelu" and "log_threshold" in found:
        found["threshold"] = found.pop("log_threshold").exp()
    if "finetuning_scaling_factor" in found:
        found["scaling_factor"] = found.pop("finetuning_scaling_factor")
    shapes: dict[str, tuple[int, ...]] = {"W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    if architecture != "matching_pursuit":
        shapes["W_enc"] = (d_in, d_sae)
        biases = ("b_gate", "b_mag", "r_mag") if architecture == "gated" else ("b_enc",)
        shapes |= dict.fromkeys(biases, (d_sae,))
    if architecture == "jumprelu":
        shapes["threshold"] = (d_sae,)
    if architecture.endswith("batchtopk"):
        shapes["topk_threshold"] = ()
    if "scaling_factor" in found:
        shapes["scaling_factor"] = (d_sae,)
    require_shapes(found, shapes, path.with_name("sae_weights.safetensors"))


def take_finetuning(cfg: Mapping[str, Any], found: dict[str, Tensor], path: Path) -> None:
    """A factor on each latent when it is decoded goes into its row: latents stay as they are."""
    scale, wanted = found.pop("scaling_factor", None), cfg.get("finetuning_scaling_factor", False)
    if scale is None:
        if wanted:
            raise StoreError(f"{path}: finetuning_scaling_factor=true, but the weights have none")
    elif wanted:
        found["W_dec"] = found["W_dec"] * scale.unsqueeze(1)
    elif not torch.allclose(scale, torch.ones_like(scale)):  # All ones were written for a while.
        raise StoreError(
            f"{path}: finetuning_scaling_factor is not set, but the weights have a scaling_factor "
            "that is not 1"
        )


def take_norms(found: dict[str, Tensor]) -> None:
    """`rescale_acts_by_decoder_norm`: latents are compared after each is times its row's norm."""
    norms = found["W_dec"].norm(dim=1)
    found["W_enc"] = found["W_enc"] * norms
    found["b_enc"] = found["b_enc"] * norms
    found["W_dec"] = found["W_dec"] / norms.clamp_min(1e-12).unsqueeze(1)


def take_normalisation(cfg: Mapping[str, Any], found: dict[str, Tensor], folder: Path) -> str:
    """Our name for what is done to each row; one factor s goes into the weights instead.

    (s x − b_dec) W_enc = (x − b_dec / s) s W_enc: latents stay as they are.
    """
    path, wanted = folder / "cfg.json", cfg.get("normalize_activations", "none")
    if wanted in ("none", "layer_norm"):
        return str(wanted)
    if wanted != "expected_average_only_in" or "W_enc" not in found:
        raise StoreError(f"{path}: normalize_activations={wanted!r} cannot be done here")
    scaler = folder / "activation_scaler.json"
    if not scaler.is_file():
        raise StoreError(
            f"{path}: normalize_activations={wanted!r}, but its factor is not beside it "
            f"({scaler.name}): save it from SAELens with the factor folded in"
        )
    factor = require(read_object(scaler), "scaling_factor", float, scaler)
    found["W_enc"] = found["W_enc"] * factor
    found["W_dec"], found["b_dec"] = found["W_dec"] / factor, found["b_dec"] / factor
    return "none"


def kind_of(
    cfg: Mapping[str, Any], found: dict[str, Tensor], path: Path
) -> tuple[str, dict[str, Any]]:
    """Our kind of an architecture, with the options that decide what it computes."""
    match cfg["architecture"]:
        case "standard":
            return "relu", {}
        case "gated":
            return "gated", {}
        case "jumprelu":
            return "jump_relu", {}
        case "topk" | "abstopk" as selection:
            return "topk", {"k": require(cfg, "k", int, path), "selection": selection}
        case "matching_pursuit":
            if not cfg.get("apply_b_dec_to_input", True):  # Nor is it added to the output then.
                found["b_dec"] = torch.zeros_like(found["b_dec"])
            return "matching_pursuit", {
                "k": cfg.get("max_iterations") or cfg["d_in"],
                "residual_threshold": cfg.get("residual_threshold", 1e-2),
                "stop_on_repeat": cfg.get("stop_on_duplicate_support", True),
                "apply_b_dec_to_input": True,
                "decoder_norm": "unit",
            }
        case _:  # BatchTopK, in training or nested: used with its threshold, and none below 0.
            found["threshold"] = found.pop("topk_threshold").clamp_min(0)
            return "batch_topk", {"k": float(cfg.get("k") or 0)}


def origin_of(metadata: dict[str, Any]) -> Origin:
    """What the metadata say of where the SAE reads."""
    hook, head = metadata.get("hook_name"), metadata.get("hook_head_index")
    return Origin(
        model=metadata.get("model_name"),
        site=site_of(str(hook), head) if hook else None,
        hook=str(hook) if hook else None,
        dataset=metadata.get("dataset_path"),
        context=metadata.get("context_size"),
        metadata=metadata,
    )
