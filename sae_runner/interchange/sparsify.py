"""EleutherAI's sparsify: `<hookpoint>/cfg.json` and `sae.safetensors` (as of 1.3.3).

encoder.weight [d_sae, d_in], encoder.bias [d_sae], W_dec [d_sae, d_in], b_dec [d_in];
f = the k largest of ReLU((x − b_dec) W_encᵀ + b), or the largest of each of k groups
"""

from pathlib import Path
from typing import Any

from sae_runner.errors import StoreError
from sae_runner.interchange import FORMATS
from sae_runner.interchange.base import (
    Contents,
    Foreign,
    Format,
    Origin,
    build,
    centred,
    read_object,
    read_tensors,
    refuse_unknown,
    require,
    require_shapes,
)
from sae_runner.saes.base import SAE

FIELDS = frozenset({
    "activation", "expansion_factor", "normalize_decoder", "num_latents", "k", "multi_topk",
    "skip_connection", "transcode", "d_in",
})  # fmt: skip


@FORMATS.register("sparsify")
class Sparsify(Format):
    """The folder of one hookpoint."""

    name = "sparsify"
    weights = "sae.safetensors"
    config_file = "cfg.json"
    usage = 'sparsify.SparseCoder.load_from_disk("FOLDER")'

    def recognises(self, folder: Path) -> bool:
        """See `Format.recognises`; our own checkpoints have files of the same names."""
        if not super().recognises(folder):
            return False
        try:
            return {"k", "d_in"} <= read_object(folder / self.config_file).keys()
        except StoreError:
            return False

    def read(self, folder: Path) -> Foreign:
        """See `Format.read`."""
        path = folder / self.config_file
        cfg = read_object(path)
        refuse_unknown(cfg, FIELDS, path)
        for flag in ("transcode", "skip_connection"):
            if cfg.get(flag, False):
                raise StoreError(f"{path}: {flag}=true: transcoders cannot be read yet")
        d_in, activation = require(cfg, "d_in", int, path), cfg.get("activation", "topk")
        if activation not in ("topk", "groupmax"):
            raise StoreError(f"{path}: activation={activation!r}: only topk and groupmax are known")
        d_sae = cfg.get("num_latents") or d_in * require(cfg, "expansion_factor", int, path)
        found = read_tensors(folder / self.weights)
        shapes = {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,), "W_dec": (d_sae, d_in),
                  "b_dec": (d_in,)}  # fmt: skip
        require_shapes(found, shapes, folder / self.weights)
        tensors = {"W_enc": found["encoder.weight"].T, "b_enc": found["encoder.bias"],
                   "W_dec": found["W_dec"], "b_dec": found["b_dec"]}  # fmt: skip
        sae = build(
            "topk", d_in, tensors, path, k=require(cfg, "k", int, path), selection=activation,
            apply_b_dec_to_input=True,
        )  # fmt: skip
        return Foreign(sae, Origin(hook=folder.name, metadata=cfg))

    def contents(self, sae: SAE, origin: Origin) -> Contents:
        """See `Format.contents`."""
        options = sae.config()
        if sae.kind not in ("topk", "archetypal"):
            raise self.lacks(sae)
        if sae.input_scaling == "layer_norm":
            raise self.lacks(sae, "input_scaling=layer_norm")
        if options["selection"] not in ("topk", "groupmax"):
            raise self.lacks(sae, f"selection={options['selection']}")
        tensors = centred(sae, wanted=True)
        cfg: dict[str, Any] = {
            "activation": options["selection"],
            "expansion_factor": -(-sae.d_sae // sae.d_in),  # num_latents decides.
            "normalize_decoder": sae.decoder_norm == "unit",
            "num_latents": sae.d_sae,
            "k": options["k"],
            "multi_topk": options["multi_topk"] > 0,
            "skip_connection": False,
            "transcode": False,
            "d_in": sae.d_in,
        }
        weights = {
            "encoder.weight": tensors["W_enc"].T, "encoder.bias": tensors["b_enc"],
            "W_dec": tensors["W_dec"], "b_dec": tensors["b_dec"],
        }  # fmt: skip
        return Contents(cfg, weights)
