"""What the module of another library's format gives, and what reading any of them needs."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from sae_runner import files
from sae_runner.config import preset
from sae_runner.errors import ConfigError, StoreError, did_you_mean
from sae_runner.saes import SAES
from sae_runner.saes.base import SAE

Shapes = Mapping[str, tuple[int, ...]]


class Origin(NamedTuple):
    """What goes with an SAE besides its weights: what it reads and how it was trained."""

    model: str | None = None
    """A name that a hub knows, if there is one."""
    site: str | None = None
    """Our canonical name, or the host's own where it has none; None: unknown, or unmappable."""
    hook: str | None = None
    """What the format's library calls the site."""
    dataset: str | None = None
    context: int | None = None
    training: Mapping[str, Any] = {}
    """`lr`, `steps`, `seed`, `batch_size` as far as they are known."""
    metadata: Mapping[str, Any] = {}
    """Whatever else the library's files say; it changes nothing of what the SAE computes."""


class Foreign(NamedTuple):
    """An SAE from another library's folder."""

    sae: SAE
    """Takes raw activations; in float32, whatever the files are in."""
    origin: Origin


class Contents(NamedTuple):
    """What the two files of a folder hold."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]


class Format(ABC):
    """How one library lays its SAEs on disk."""

    name: ClassVar[str]
    weights: ClassVar[str]
    """The file of weights in a folder."""
    config_file: ClassVar[str]
    extras: ClassVar[tuple[str, ...]] = ()
    """Further files that reading takes into account."""
    usage: ClassVar[str]
    """A line of Python that loads a folder with the format's own library."""

    def recognises(self, folder: Path) -> bool:
        """Whether a folder holds an SAE of this format."""
        return all((folder / name).is_file() for name in (self.weights, self.config_file))

    @abstractmethod
    def read(self, folder: Path) -> Foreign:
        """The SAE in a folder, as one of ours that computes the same.

        Raises:
            StoreError: damaged, or it says something that no SAE of ours can do.
        """

    @abstractmethod
    def contents(self, sae: SAE, origin: Origin) -> Contents:
        """What a folder with a folded SAE holds.

        Raises:
            ConfigError: the format has nothing that computes the same, or lacks a name it needs.
        """

    def save(self, folder: Path, contents: Contents) -> None:
        """Write both files into an existing folder."""
        files.write_text(folder / self.config_file, json.dumps(contents.config, indent=2))
        files.write_tensors(folder / self.weights, contents.tensors)

    def write(self, folder: Path, sae: SAE, origin: Origin) -> None:
        """`save` of `contents`."""
        self.save(folder, self.contents(sae, origin))

    def lacks(self, sae: SAE, what: str = "") -> ConfigError:
        """The error of a kind, or of an option of it, that the format has no place for."""
        return ConfigError(
            f"format={self.name}: it has no SAE like sae.type={sae.kind}{what and f' with {what}'}"
        )


# -- Reading -------------------------------------------------------------------------------------


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        StoreError: the file holds something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise StoreError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file, in float32.

    Raises:
        StoreError: the file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{path} is damaged: {error}") from None
    return {name: tensor.float() for name, tensor in found.items()}


def refuse_unknown(found: Mapping[str, Any], known: frozenset[str], path: Path) -> None:
    """Refuse fields whose meaning for the SAE is not known here.

    Raises:
        StoreError: the first of them.
    """
    if unknown := sorted(map(str, found.keys() - known)):
        raise StoreError(
            f"{path}: field {unknown[0]!r}={found[unknown[0]]!r} is unknown here, and may change "
            f"what the SAE computes.{did_you_mean(unknown[0], known)}"
        )


def require(found: Mapping[str, Any], key: str, kind: type, path: Path) -> Any:
    """A field of a given type.

    Raises:
        StoreError: it is absent or of another type.
    """
    value = found.get(key)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        problem = "is absent" if key not in found else f"is {value!r}, no {kind.__name__}"
        raise StoreError(f"{path}: field {key!r} {problem}")
    return value


def require_shapes(tensors: Mapping[str, Tensor], shapes: Shapes, path: Path) -> None:
    """Refuse a file of weights that holds other tensors than these.

    Raises:
        StoreError: the first tensor that is absent, surplus or of another shape.
    """
    for name in sorted(tensors.keys() | shapes.keys()):
        if name not in tensors:
            raise StoreError(f"{path}: tensor {name!r} is absent")
        if name not in shapes:
            raise StoreError(f"{path}: tensor {name!r} is unknown here")
        if (found := tuple(tensors[name].shape)) != shapes[name]:
            raise StoreError(f"{path}: {name} has shape {found}, expected {shapes[name]}")


def build(kind: str, d_in: int, tensors: Mapping[str, Tensor], where: Path, **options: Any) -> SAE:
    """One of our SAEs with these weights (`W_enc` as [d_in, d_sae]), ready to be used.

    Options that are not given decide training alone, and are those of the kind's YAML.

    Raises:
        StoreError: the kind refuses the options.
    """
    as_it_is = {"input_scaling": "none", "loss_reduction": "sum", "decoder_norm": "free",
                "target_l0": None, "units": None, "expansion": None}  # fmt: skip
    cfg = {**preset("sae", kind), **as_it_is, "d_sae": len(tensors["W_dec"]), **options}
    try:
        sae: SAE = SAES.build(cfg, d_in=d_in, d_out=tensors["W_dec"].shape[1])
    except ConfigError as error:
        raise StoreError(f"{where}: {error}") from None
    sae.load_tensors({**sae.tensors(), **tensors})
    return sae.eval().requires_grad_(False)


def weights_hash(folder: Path, known: Format) -> str:
    """SHA-256 of all files that decide what a foreign SAE computes."""
    names = (known.weights, known.config_file, *known.extras)
    hashes = {name: files.sha256(folder / name) for name in names if (folder / name).is_file()}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


# -- Writing -------------------------------------------------------------------------------------


def centred(sae: SAE, wanted: bool) -> dict[str, Tensor]:
    """The weights of an encoder that sees x − b_dec (or x), and gives the same latents.

    (x − b_dec) W + b = x W + (b − b_dec W), in float64; of a gated SAE both paths move.
    """
    tensors = {name: tensor.cpu() for name, tensor in sae.tensors().items()}
    if sae.apply_b_dec_to_input == wanted:
        return tensors
    shift = tensors["b_dec"].double() @ tensors["W_enc"].double()
    shift = shift if wanted else -shift
    shifts = {"b_enc": shift, "b_gate": shift}
    if "r_mag" in tensors:
        shifts["b_mag"] = shift * tensors["r_mag"].double().exp()
    for name in shifts.keys() & tensors.keys():
        moved = tensors[name].double() + shifts[name]
        tensors[name] = moved.to(tensors[name].dtype)
    return tensors
