"""dictionary_learning: `ae.pt`, a state dict that torch wrote, and `config.json` (as of 0.1.0).

d = activation_dim, F = dict_size; encoders of nn.Linear are [F, d] and decoders [d, F]:

    AutoEncoder               encoder.weight, encoder.bias, decoder.weight, bias [d]
    AutoEncoderNew            encoder.weight, encoder.bias, decoder.weight, decoder.bias
    GatedAutoEncoder          encoder.weight, decoder.weight, r_mag, gate_bias, mag_bias [F],
                              decoder_bias [d]
    JumpReluAutoEncoder       W_enc [d, F], W_dec [F, d], b_enc, b_dec, threshold [F]
    AutoEncoderTopK           encoder.weight, encoder.bias, decoder.weight, b_dec, k, threshold
    BatchTopKSAE              the same; latents must exceed the threshold, −1: it was not measured
    MatryoshkaBatchTopKSAE    W_enc, W_dec, b_enc, b_dec, k, threshold, group_sizes [G]

The input is x − b_dec but in AutoEncoderNew and JumpReluAutoEncoder.
"""

import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_runner import files
from sae_runner.errors import ConfigError, StoreError
from sae_runner.interchange import FORMATS
from sae_runner.interchange.base import (
    Contents,
    Foreign,
    Format,
    Origin,
    build,
    centred,
    read_object,
    refuse_unknown,
    require,
    require_shapes,
)
from sae_runner.saes.base import SAE

TRAINER = frozenset({
    "activation_dim", "anneal_start", "auxk_alpha", "bandwidth", "decay_start", "device",
    "dict_class", "dict_size", "group_fractions", "group_sizes", "group_weights",
    "initial_threshold", "k", "k_anneal_steps", "l1_penalty", "l1_penalty_target_l0", "layer",
    "lm_name", "lr", "n_sparsity_updates", "norm_factor", "p_end", "p_start", "resample_steps",
    "seed", "sparsity_function", "sparsity_penalty", "sparsity_queue_length",
    "sparsity_warmup_steps", "steps", "submodule_name", "target_l0", "threshold_beta",
    "threshold_start_step", "top_k_aux", "trainer_class", "wandb_name", "warmup_steps",
})  # fmt: skip
LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight"}
PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
NAMES: dict[str, dict[str, str]] = {
    "AutoEncoder": {**LINEAR, "b_dec": "bias"},
    "AutoEncoderNew": {**LINEAR, "b_dec": "decoder.bias"},
    "GatedAutoEncoder": {
        "W_enc": "encoder.weight", "W_dec": "decoder.weight", "r_mag": "r_mag",
        "b_gate": "gate_bias", "b_mag": "mag_bias", "b_dec": "decoder_bias",
    },
    "JumpReluAutoEncoder": {**PLAIN, "threshold": "threshold"},
    "AutoEncoderTopK": {**LINEAR, "b_dec": "b_dec"},
    "BatchTopKSAE": {**LINEAR, "b_dec": "b_dec"},
    "MatryoshkaBatchTopKSAE": PLAIN,
}  # fmt: skip
"""By class: our name of each tensor that has a place in our SAE, and its name there."""
UNCENTRED = ("AutoEncoderNew", "JumpReluAutoEncoder")
CHOOSING = ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE")
CLASSES = {
    "relu": "AutoEncoder", "p_anneal": "AutoEncoder", "gated": "GatedAutoEncoder",
    "jump_relu": "JumpReluAutoEncoder", "topk": "AutoEncoderTopK", "archetypal": "AutoEncoderTopK",
    "batch_topk": "BatchTopKSAE", "matryoshka": "MatryoshkaBatchTopKSAE",
}  # fmt: skip
TRAINERS = {
    "AutoEncoder": "StandardTrainer", "AutoEncoderNew": "StandardTrainerAprilUpdate",
    "GatedAutoEncoder": "GatedSAETrainer", "JumpReluAutoEncoder": "JumpReluTrainer",
    "AutoEncoderTopK": "TopKTrainer", "BatchTopKSAE": "BatchTopKTrainer",
    "MatryoshkaBatchTopKSAE": "MatryoshkaBatchTopKTrainer",
}  # fmt: skip


@FORMATS.register("dictionary_learning")
class DictionaryLearning(Format):
    """The folder of one trained dictionary."""

    name = "dictionary_learning"
    weights = "ae.pt"
    config_file = "config.json"
    usage = 'dictionary_learning.utils.load_dictionary("FOLDER", device="cpu")'

    def read(self, folder: Path) -> Foreign:
        """See `Format.read`."""
        path = folder / self.config_file
        cfg = read_object(path)
        refuse_unknown(cfg, frozenset({"trainer", "buffer"}), path)
        trainer = require(cfg, "trainer", dict, path)
        refuse_unknown(trainer, TRAINER, path)
        buffer = cfg.get("buffer") or {}
        if buffer.get("io", "out") == "in_and_out":
            raise StoreError(f"{path}: buffer.io=in_and_out: transcoders cannot be read yet")
        dict_class = require(trainer, "dict_class", str, path)
        if dict_class not in NAMES:
            raise StoreError(
                f"{path}: dict_class={dict_class!r} cannot be read; {', '.join(NAMES)} can"
            )
        d_in = require(trainer, "activation_dim", int, path)
        found = read_state(folder / self.weights)
        check_state(found, dict_class, d_in, require(trainer, "dict_size", int, path), folder)
        sae = sae_of(found, dict_class, d_in, trainer, folder)
        hook = trainer.get("submodule_name")
        training = {key: trainer.get(key) for key in ("lr", "steps", "seed")}
        return Foreign(sae, Origin(
            model=trainer.get("lm_name"), site=site_of(hook, trainer.get("layer")), hook=hook,
            context=buffer.get("ctx_len"), training=training, metadata=cfg,
        ))  # fmt: skip

    def contents(self, sae: SAE, origin: Origin) -> Contents:
        """See `Format.contents`."""
        dict_class, options = self.class_of(sae), sae.config()
        tensors = centred(sae, wanted=dict_class not in UNCENTRED)
        names = NAMES[dict_class]
        state = {theirs: tensors[ours].float() for ours, theirs in names.items()}
        for theirs in filter(lambda name: name.endswith(".weight"), names.values()):
            state[theirs] = state[theirs].T
        own: dict[str, Any] = {}
        if dict_class in CHOOSING:
            own["k"] = int(options["k"])
            state["k"] = torch.tensor(own["k"], dtype=torch.int32)
            state["threshold"] = tensors.get("threshold", torch.tensor(-1.0)).float()
        if dict_class == "MatryoshkaBatchTopKSAE":
            widths: list[int] = sae.widths  # type: ignore[assignment]
            own["group_sizes"] = [b - a for a, b in itertools.pairwise([0, *widths])]
            state["group_sizes"] = torch.tensor(own["group_sizes"])
        return Contents(self.config_of(dict_class, sae, origin, own), state)

    def save(self, folder: Path, contents: Contents) -> None:
        """See `Format.save`; the weights as torch writes a state dict."""
        files.write_text(folder / self.config_file, json.dumps(contents.config, indent=4))
        state = {name: tensor.contiguous() for name, tensor in contents.tensors.items()}
        with files.atomic(folder / self.weights) as temporary:
            torch.save(state, temporary)

    def class_of(self, sae: SAE) -> str:
        """The class that computes what the SAE does."""
        if sae.kind not in CLASSES:
            raise self.lacks(sae)
        if sae.input_scaling == "layer_norm":
            raise self.lacks(sae, "input_scaling=layer_norm")
        options = sae.config()
        if (selection := options.get("selection", "topk")) != "topk":
            raise self.lacks(sae, f"selection={selection}")
        if not float(options.get("k", 1)).is_integer():
            raise self.lacks(sae, f"k={options['k']:g}, no whole number")
        if CLASSES[sae.kind] == "AutoEncoder" and not sae.apply_b_dec_to_input:
            return "AutoEncoderNew"
        return CLASSES[sae.kind]

    def config_of(
        self, dict_class: str, sae: SAE, origin: Origin, own: Mapping[str, Any]
    ) -> dict[str, Any]:
        """config.json: what is not known here is null.

        Raises:
            ConfigError: the site is in no layer.
        """
        layer, submodule = None, origin.hook
        if match := re.match(
            r"blocks\.(\d+)\.(.+)", (origin.site if not origin.hook else "") or ""
        ):
            layer, submodule = int(match[1]), f"{match[2]}_layer_{match[1]}"
        elif origin.hook is None and origin.site is not None:
            raise ConfigError(
                f"format={self.name}: site {origin.site} is in no layer, which it asks for; "
                "hook_name= sets what is written for it"
            )
        elif match := re.search(r"\d+", origin.hook or ""):
            layer = int(match[0])
        known = origin.training
        return {
            "trainer": {
                "dict_class": dict_class,
                "trainer_class": TRAINERS[dict_class],
                "activation_dim": sae.d_in,
                "dict_size": sae.d_sae,
                "lr": known.get("lr"),
                "steps": known.get("steps"),
                "seed": known.get("seed"),
                "device": "cpu",
                "layer": layer,
                "lm_name": origin.model,
                "wandb_name": TRAINERS[dict_class],
                "submodule_name": submodule,
                **own,
            },
            "buffer": {
                "d_submodule": sae.d_in,
                "io": "out",
                "n_ctxs": None,
                "ctx_len": origin.context,
                "refresh_batch_size": None,
                "out_batch_size": known.get("batch_size"),
                "device": "cpu",
            },
        }


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict of ae.pt, of which nothing is run: tensors alone are read.

    Raises:
        StoreError: it is damaged or holds something else.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Unpickling ends in errors of every kind.
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise StoreError(f"{path} is no state dict: {first}") from None
    if isinstance(found, dict) and {"ae", "optimizer"} <= found.keys():
        raise StoreError(f"{path} is a backup of a run in progress, not a trained dictionary")
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise StoreError(f"{path} is no state dict: it holds more than tensors")
    return found


def check_state(
    found: dict[str, Tensor], dict_class: str, d_in: int, d_sae: int, folder: Path
) -> None:
    """Refuse a state dict that is not that of the class."""
    shapes: dict[str, tuple[int, ...]] = {}
    for ours, theirs in NAMES[dict_class].items():
        matrix = (d_in, d_sae) if theirs in ("W_enc", "decoder.weight") else (d_sae, d_in)
        vector = (d_in,) if ours == "b_dec" else (d_sae,)
        shapes[theirs] = matrix if ours.startswith("W_") else vector
    if dict_class in CHOOSING:
        shapes |= {"k": (), "threshold": ()}
    if dict_class == "MatryoshkaBatchTopKSAE" and "group_sizes" in found:
        shapes["group_sizes"] = tuple(found["group_sizes"].shape)
    if dict_class == "AutoEncoderTopK" and "threshold" not in found:  # Before it had one.
        del shapes["threshold"]
    require_shapes(found, shapes, folder / DictionaryLearning.weights)


def sae_of(
    found: dict[str, Tensor], dict_class: str, d_in: int, trainer: Mapping[str, Any], folder: Path
) -> SAE:
    """One of our SAEs that computes what the class does with its state dict."""
    path = folder / DictionaryLearning.config_file
    tensors = {}
    for ours, theirs in NAMES[dict_class].items():
        tensors[ours] = found[theirs].T if theirs.endswith(".weight") else found[theirs]
    options: dict[str, Any] = {"apply_b_dec_to_input": dict_class not in UNCENTRED}
    if dict_class in CHOOSING:
        options["k"] = int(found["k"])
        if "k" in trainer and trainer["k"] != options["k"]:
            raise StoreError(f"{path}: k={trainer['k']}, but it is {options['k']} in the weights")
    if dict_class == "AutoEncoder":  # Its loader does this.
        norms = tensors["W_dec"].norm(dim=1)
        norms = torch.where(norms > 0, norms, 1)
        tensors["W_dec"] = tensors["W_dec"] / norms.unsqueeze(1)
        tensors["W_enc"], tensors["b_enc"] = tensors["W_enc"] * norms, tensors["b_enc"] * norms
    match dict_class:
        case "AutoEncoder" | "AutoEncoderNew":
            kind = "relu"
        case "GatedAutoEncoder":
            kind = "gated"
        case "JumpReluAutoEncoder":
            kind = "jump_relu"
        case "AutoEncoderTopK":
            kind = "topk"
        case _:  # Latents are rectified before they are compared: −1 lets all through, as 0 does.
            kind, tensors["threshold"] = "batch_topk", found["threshold"].clamp_min(0)
    if dict_class == "MatryoshkaBatchTopKSAE":
        kind, sizes = "matryoshka", found["group_sizes"].tolist()
        options["group_fractions"] = [size / sum(sizes) for size in sizes]
    return build(kind, d_in, tensors, path, **options)


def site_of(hook: Any, layer: Any) -> str | None:
    """`resid_post_layer_3` as `blocks.3.resid_post`, which is how our exports name it too."""
    match = re.fullmatch(r"(resid_pre|resid_mid|resid_post|attn_out|mlp_out|mlp_act)_layer_(\d+)",
                         str(hook))  # fmt: skip
    if not match or (layer is not None and int(match[2]) != layer):
        return None
    return f"blocks.{match[2]}.{match[1]}"
