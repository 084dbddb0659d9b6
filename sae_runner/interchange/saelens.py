"""SAELens: `cfg.json` and `sae_weights.safetensors` (version 6, as of 6.54; older ones are read).

W_enc [d_in, d_sae], W_dec [d_sae, d_in], b_dec [d_in] and, by architecture,

    standard, topk, abstopk   b_enc
    jumprelu                  b_enc, threshold [d_sae]
    gated                     b_gate, b_mag, r_mag and no b_enc
    matching_pursuit          neither W_enc nor b_enc
    batchtopk                 and matryoshka_batchtopk are saved for inference as a jumprelu whose
                              thresholds are equal; a checkpoint of training has one number instead
"""

from pathlib import Path
from typing import Any

from sae_runner.errors import ConfigError
from sae_runner.interchange import FORMATS
from sae_runner.interchange._hooks import hook_of
from sae_runner.interchange._saelens_reading import checked, origin_of, read_sae
from sae_runner.interchange.base import (
    Contents,
    Foreign,
    Format,
    Origin,
    read_object,
    read_tensors,
)
from sae_runner.saes.base import SAE

VERSION = "6.54.12"
"""Whose form is written. Without a version of 6 or more SAELens reads a file as an older one."""
BIASED = ("W_enc", "W_dec", "b_enc", "b_dec")
ARCHITECTURES: dict[str, tuple[str, tuple[str, ...]]] = {
    "relu": ("standard", BIASED),
    "p_anneal": ("standard", BIASED),
    "gated": ("gated", ("W_enc", "W_dec", "b_gate", "b_mag", "r_mag", "b_dec")),
    "jump_relu": ("jumprelu", (*BIASED, "threshold")),
    "batch_topk": ("jumprelu", (*BIASED, "threshold")),
    "matryoshka": ("jumprelu", (*BIASED, "threshold")),
    "topk": ("topk", BIASED),
    "archetypal": ("topk", BIASED),
    "matching_pursuit": ("matching_pursuit", ("W_dec", "b_dec")),
}
"""By our kind: the architecture as which it is saved, and its tensors."""
TRAINED_AS = {"batch_topk": "batchtopk", "matryoshka": "matryoshka_batchtopk"}


@FORMATS.register("saelens")
class SAELens(Format):
    """The folder of one SAE: as saved for inference, or a checkpoint of training."""

    name = "saelens"
    weights = "sae_weights.safetensors"
    config_file = "cfg.json"
    extras = ("activation_scaler.json",)
    usage = 'sae_lens.SAE.load_from_disk("FOLDER")'

    def read(self, folder: Path) -> Foreign:
        """See `Format.read`."""
        path = folder / self.config_file
        cfg = checked(read_object(path), path)
        sae = read_sae(cfg, read_tensors(folder / self.weights), folder)
        return Foreign(sae, origin_of(dict(cfg.get("metadata") or {})))

    def contents(self, sae: SAE, origin: Origin) -> Contents:
        """See `Format.contents`."""
        if sae.kind not in ARCHITECTURES:
            raise self.lacks(sae)
        architecture, names = ARCHITECTURES[sae.kind]
        options, own = sae.config(), {}
        if architecture == "topk":
            if options["selection"] == "groupmax":
                raise self.lacks(sae, "selection=groupmax")
            architecture = options["selection"]
            own = {"k": options["k"], "rescale_acts_by_decoder_norm": False}
        if architecture == "matching_pursuit":
            own = {"residual_threshold": options["residual_threshold"],
                   "max_iterations": options["k"],
                   "stop_on_duplicate_support": options["stop_on_repeat"]}  # fmt: skip
        tensors = {name: tensor.cpu().float() for name, tensor in sae.tensors().items()}
        if "threshold" in names:  # BatchTopK has one for all latents.
            tensors["threshold"] = tensors["threshold"].expand(sae.d_sae)
        cfg = {
            "d_in": sae.d_in,
            "d_sae": sae.d_sae,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": sae.apply_b_dec_to_input,
            "normalize_activations": "layer_norm" if sae.input_scaling == "layer_norm" else "none",
            "reshape_activations": "none",
            "metadata": {**self.metadata_of(origin), **trained_as(sae)},
            **own,
            "architecture": architecture,
        }
        return Contents(cfg, {name: tensors[name] for name in names})

    def metadata_of(self, origin: Origin) -> dict[str, Any]:
        """What SAELens' users look for: model, hook, dataset.

        Raises:
            ConfigError: TransformerLens has no hook at the site.
        """
        hook, head = origin.hook, origin.metadata.get("hook_head_index") if origin.hook else None
        if hook is None and origin.site is not None:
            found = hook_of(origin.site)
            if found is None:
                raise ConfigError(
                    f"format={self.name}: site {origin.site} is no hook of TransformerLens; "
                    "hook_name= sets what is written for it"
                )
            hook, head = found
        return {
            "sae_lens_version": VERSION,
            "sae_lens_training_version": None,
            "model_name": origin.model,
            "hook_name": hook,
            "hook_head_index": head,
            "dataset_path": origin.dataset,
            "context_size": origin.context,
        }


def trained_as(sae: SAE) -> dict[str, Any]:
    """What a jumprelu was while it was trained."""
    if sae.kind not in TRAINED_AS:
        return {}
    return {
        "training_architecture": TRAINED_AS[sae.kind],
        "training_architecture_details": {"k": sae.config()["k"]},
    }
