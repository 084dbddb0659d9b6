"""EleutherAI's sparsify: `<hookpoint>/cfg.json` and `sae.safetensors` (as of 1.3.3).

encoder.weight [d_sae, d_in], encoder.bias [d_sae], W_dec [d_sae, d_in], b_dec [d_in];
f = the k largest of ReLU((x − b_dec) W_encᵀ + b), or the largest of each of k groups

A transcoder does not subtract b_dec, and may add x W_skipᵀ [d_in, d_in] to f W_dec + b_dec.
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

NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
"""Their tensors and ours."""


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
        transcode, skip = bool(cfg.get("transcode")), bool(cfg.get("skip_connection"))
        if skip and not transcode:
            raise StoreError(f"{path}: skip_connection=true without transcode: no SAE of ours")
        d_in, activation = require(cfg, "d_in", int, path), cfg.get("activation", "topk")
        if activation not in ("topk", "groupmax"):
            raise StoreError(f"{path}: activation={activation!r}: only topk and groupmax are known")
        d_sae = cfg.get("num_latents") or d_in * require(cfg, "expansion_factor", int, path)
        found = read_tensors(folder / self.weights)
        shapes = {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,), "W_dec": (d_sae, d_in),
                  "b_dec": (d_in,), **({"W_skip": (d_in, d_in)} if skip else {})}  # fmt: skip
        require_shapes(found, shapes, folder / self.weights)
        tensors = {NAMES.get(name, name): tensor for name, tensor in found.items()}
        tensors["W_enc"] = tensors["W_enc"].T
        own = {"skip": skip} if transcode else {}
        sae = build(
            "transcoder" if transcode else "topk", d_in, tensors, path,
            k=require(cfg, "k", int, path), selection=activation,
            apply_b_dec_to_input=not transcode, **own,
        )  # fmt: skip
        return Foreign(sae, Origin(hook=folder.name, metadata=cfg))

    def contents(self, sae: SAE, origin: Origin) -> Contents:
        """See `Format.contents`."""
        options = sae.config()
        if sae.kind not in ("topk", "archetypal", "transcoder"):
            raise self.lacks(sae)
        if sae.d_out != sae.d_in:
            raise self.lacks(sae, f"d_in={sae.d_in} and d_out={sae.d_out}")
        if sae.input_scaling == "layer_norm":
            raise self.lacks(sae, "input_scaling=layer_norm")
        if options["selection"] not in ("topk", "groupmax"):
            raise self.lacks(sae, f"selection={options['selection']}")
        tensors = centred(sae, wanted=sae.kind != "transcoder")
        cfg: dict[str, Any] = {
            "activation": options["selection"],
            "expansion_factor": -(-sae.d_sae // sae.d_in),  # num_latents decides.
            "normalize_decoder": sae.decoder_norm == "unit",
            "num_latents": sae.d_sae,
            "k": options["k"],
            "multi_topk": options["multi_topk"] > 0,
            "skip_connection": options.get("skip", False),
            "transcode": sae.kind == "transcoder",
            "d_in": sae.d_in,
        }
        tensors["W_enc"] = tensors["W_enc"].T
        weights = {theirs: tensors[ours] for theirs, ours in NAMES.items()}
        if options.get("skip", False):
            weights["W_skip"] = tensors["W_skip"]
        return Contents(cfg, weights)
