"""From YAML to objects: where configs live, what runs are called, how classes are built.

A class's typed `__init__` is its schema. A number's allowed range stands in its type, as in
`k: Positive` (see the aliases below), so it is checked before anything is built.
"""

import dataclasses
import hashlib
import importlib
import inspect
import itertools
import json
import math
import os
import pkgutil
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sae_runner.errors import ConfigError, did_you_mean, nearest


@dataclasses.dataclass(frozen=True)
class Range:
    """Bounds of a number, carried in its type: `Annotated[int, Range(gt=0)]`."""

    gt: float = -math.inf
    ge: float = -math.inf
    lt: float = math.inf
    le: float = math.inf

    def complaint(self, value: float) -> str | None:
        """What is wrong with `value` (or with each of a list), or None."""
        for sign, bound, bad in (
            (">", self.gt, not value > self.gt), (">=", self.ge, not value >= self.ge),
            ("<", self.lt, not value < self.lt), ("<=", self.le, not value <= self.le),
        ):  # fmt: skip
            if bad and not math.isinf(bound):
                return f"must be {sign} {bound:g}"
        return "must be finite" if math.isinf(value) or math.isnan(value) else None


class Filled:
    """Some text, carried in its type."""

    def complaint(self, value: str) -> str | None:
        """What is wrong with `value`, or None."""
        return None if value else "needs a value"


Name = Annotated[str, Filled()]
Positive = Annotated[int, Range(gt=0)]
NonNegative = Annotated[int, Range(ge=0)]
PositiveFloat = Annotated[float, Range(gt=0)]
NonNegativeFloat = Annotated[float, Range(ge=0)]
Fraction = Annotated[float, Range(ge=0, le=1)]
"""From 0 to 1, both included."""
Memory = Annotated[float, Range(ge=0, lt=1)]
"""Share of a running mean that stays at each step."""
ProperFraction = Annotated[float, Range(gt=0, lt=1)]
"""Between 0 and 1, both excluded."""

# Keys whose value may be a path: how it is spelled names no other run.
PATH_KEYS = ("path", "weights")

# What changes neither a number nor a byte of a result, and so not the name of a run. A model's
# site and tokens are but the defaults of `site`.
RUNTIME_KEYS = frozenset({
    "model.site", "model.tokens", "model.batch_size", "dataset.workers", "dataset.max_bad",
    "store.prefetch", "store.verify", "store.keep_gb", "trainer.cuda_graph",
    "trainer.log_every", "trainer.save_every", "trainer.checkpoints", "trainer.checkpoint_spacing",
    "trainer.checkpoint_interventions", "trainer.keep_state",
})  # fmt: skip


def config_dir() -> str:
    """The built-in YAML: inside an installed wheel, or the repository's `configs/`."""
    here = Path(__file__).parent
    return str(next(p for p in (here / "configs", here.parent / "configs") if p.is_dir()))


def options_of(group: str) -> list[str]:
    """Names of the built-in options of a config group."""
    return sorted(path.stem for path in (Path(config_dir()) / group).glob("*.yaml"))


def preset(group: str, name: str) -> dict[str, Any]:
    """The keys of a built-in option's own YAML as they stand there, `${…}` unresolved.

    The options that it composes are left out.
    """
    loaded: Any = OmegaConf.to_container(OmegaConf.load(f"{config_dir()}/{group}/{name}.yaml"))
    return {key: value for key, value in loaded.items() if key != "defaults"}


def fingerprint(value: Any) -> str:
    """Eight hex digits that are equal exactly when the JSON of `value` is equal."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def identity(cfg: Mapping[str, Any], groups: tuple[str, ...]) -> dict[str, Any]:
    """The part of a config that decides a result: `groups` without RUNTIME_KEYS, paths resolved.

    A value that names an existing file or folder counts as where it really is, so that how a path
    is spelled does not name a new run.
    """

    def clean(value: Any, key: str) -> Any:
        if isinstance(value, Mapping):
            kept = {k: v for k, v in value.items() if f"{key}.{k}" not in RUNTIME_KEYS}
            return {str(k): clean(v, f"{key}.{k}") for k, v in kept.items()}
        if isinstance(value, list | tuple):
            return [clean(v, key) for v in value]
        if isinstance(value, float) and value.is_integer():
            return int(value)  # 8.0 and 8, 1e6 and 1_000_000 are one configuration.
        if isinstance(value, str) and value and key.endswith(PATH_KEYS):
            path = Path(value).expanduser()
            if any(c in value for c in "*?["):  # A glob: where it is looked for counts.
                fixed = itertools.takewhile(lambda part: not set(part) & set("*?["), path.parts)
                head = Path(*fixed)
                return str(head.resolve() / path.relative_to(head))
            return str(path.resolve()) if path.exists() else value
        return value

    values = plain(cfg)
    return {group: clean(values.get(group), group) for group in groups}


def plain(cfg: Mapping[str, Any] | None) -> dict[str, Any]:
    """A config as an ordinary dict, with its interpolations resolved."""
    if cfg is None:
        return {}
    if isinstance(cfg, DictConfig):
        return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    return dict(cfg)


class Registry:
    """Classes of one kind; the type `name` is registered by module `name` of `package`.

    Other distributions add theirs through the entry-point group of the package's name.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind, self.package = kind, package
        self.classes: dict[str, type] = {}

    def register(self, name: str) -> Callable[[type], type]:
        """Class decorator: make the class available as `type: name`."""

        def add(cls: type) -> type:
            self.classes[name] = cls
            return cls

        return add

    def names(self) -> list[str]:
        """Every type there is, read from file names without importing them."""
        path = importlib.import_module(self.package).__path__
        built_in = {m.name for m in pkgutil.iter_modules(path) if not m.name.startswith("_")}
        return sorted((built_in - {"base"}) | set(self._entry_points()) | set(self.classes))

    def _entry_points(self) -> dict[str, Any]:
        from importlib.metadata import entry_points

        return {entry.name: entry for entry in entry_points(group=self.package)}

    def __getitem__(self, name: str) -> type:
        if name not in self.classes:
            if name not in self.names():
                hint = did_you_mean(name, self.names())
                raise ConfigError(f"{self.kind}.type={name}: no such type.{hint}")
            if name in (found := self._entry_points()):
                self.classes.setdefault(name, found[name].load())
            else:
                importlib.import_module(f"{self.package}.{name}")
        if name not in self.classes:
            raise ConfigError(f"{self.package}.{name} registers no class {name!r}")
        return self.classes[name]

    def check(self, cfg: Mapping[str, Any], where: str = "") -> dict[str, Any]:
        """The options of `cfg`, each of its declared type and range, without building anything.

        Raises:
            ConfigError: unknown type or key, missing key, wrong type, value out of range.
        """
        options = plain(cfg)
        where = where or self.kind
        name = options.pop("type", None)
        if name is None:
            named = where.partition(".")[2]  # As in evaluators.NAME, which mostly is its type.
            raise ConfigError(f"'{where}.type' needs a value.{did_you_mean(named, self.names())}")
        try:
            cls = self[str(name)]
        except ConfigError as error:
            raise ConfigError(
                str(error).replace(f"{self.kind}.type=", f"{where}.type=", 1)
            ) from None
        return checked_options(cls, options, where=where)

    def build(self, cfg: Mapping[str, Any], where: str = "", **runtime: Any) -> Any:
        """Construct `cfg.type` from the other keys of `cfg` and objects known only at run time."""
        options = self.check(cfg, where)
        cls = self[plain(cfg)["type"]]
        known = inspect.signature(cls).parameters
        return cls(**options, **{k: v for k, v in runtime.items() if k in known})


def checked_options(
    target: Callable[..., Any], options: Mapping[str, Any], *, where: str
) -> dict[str, Any]:
    """`options`, each converted to what the signature of `target` declares.

    Keyword-only parameters are the options, and so are the keys of a typed dict that the signature
    takes (`**common: Unpack[Common]`); positional ones are objects known only at run time.
    """
    at = f"{where}." if where else ""
    parameters = inspect.signature(target).parameters
    hints = typing.get_type_hints(
        target.__init__ if inspect.isclass(target) else target, include_extras=True
    )
    expected = {k: p.default is p.empty for k, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    for name, parameter in parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            (shared,) = typing.get_args(hints[name])
            expected |= dict.fromkeys(shared.__annotations__, True)
            hints |= typing.get_type_hints(shared, include_extras=True)
    if unknown := sorted(map(str, options.keys() - expected.keys())):
        raise ConfigError(f"no key '{at}{unknown[0]}'.{did_you_mean(unknown[0], expected)}")
    if missing := [k for k, needed in expected.items() if needed and k not in options]:
        raise ConfigError(f"'{at}{missing[0]}' needs a value")
    return {k: convert(v, hints.get(k, Any), at + k) for k, v in options.items()}


MOST_INT = 2**63 - 1
"""What torch, numpy and safetensors can count to."""


def convert(value: Any, hint: Any, key: str) -> Any:
    """`value` as `hint`, by the rules OmegaConf applies to a structured config's field.

    Literals, ranges (`Annotated[int, Range(…)]`) and unions with other types are understood too.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        value = convert(value, arguments[0], key)
        for bound in arguments[1:]:
            items = value if isinstance(value, list | tuple) else [value]
            for item in items if isinstance(bound, Range | Filled) else []:
                if item is not None and (complaint := bound.complaint(item)):
                    raise ConfigError(f"{key}={item}: {complaint}")
        return value
    if origin in (typing.Union, types.UnionType):
        return convert_union(value, arguments, key)
    if origin is list and isinstance(value, list | tuple):
        return [convert(item, arguments[0], key) for item in value]
    if value is None and hint not in (Any, types.NoneType):
        raise ConfigError(f"{key}=null: needs a value")
    if origin is list:
        raise ConfigError(f"{key}={value}: needs a list, as in {key}=[{value}]")
    if origin is typing.Literal:
        if value not in arguments:
            raise ConfigError(
                f"{key}={value}: not one of its values.{did_you_mean(str(value), arguments)}"
            )
        return value
    if hint is Any:
        return value
    if hint is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # trainer.n_tokens=1e6 means what it says.
    if hint is int and isinstance(value, int) and abs(value) > MOST_INT:
        raise ConfigError(f"{key}={value:.4g}: must be < 2^63")
    schema = dataclasses.make_dataclass("Schema", [("value", hint)])
    try:
        return cast(Any, OmegaConf.to_object(OmegaConf.structured(schema(value)))).value
    except OmegaConfBaseException as error:
        raise ConfigError(f"{key}={value}: {str(error).splitlines()[0]}") from None


def convert_union(value: Any, members: tuple[Any, ...], key: str) -> Any:
    """`value` as the first member that takes it; a None is only ever itself."""
    if value is None and type(None) in members:
        return None
    first: ConfigError | None = None
    for member in members:
        if member is type(None):
            continue
        # "all" is a str as it stands: only what is not yet a member is converted.
        try:
            return convert(value, member, key)
        except ConfigError as error:
            of_a_list = isinstance(value, list) and typing.get_origin(member) is list
            first = error if of_a_list else first or error
    words = [w for m in members if typing.get_origin(m) is typing.Literal for w in m.__args__]
    if isinstance(value, str) and (close := nearest(value, words)):
        raise ConfigError(f"{first}. Did you mean {close[0]!r}?")
    raise first or ConfigError(f"{key}={value}: no value is allowed here")


def construct(
    target: Callable[..., Any], options: Mapping[str, Any], *, where: str, **runtime: Any
) -> Any:
    """Call `target` with `options` checked against its signature, and run-time objects."""
    return target(**checked_options(target, options, where=where), **runtime)


def resolve_device(name: str) -> str:
    """`auto` as the best device here: cuda, mps, else cpu.

    Raises:
        ConfigError: the device is unknown to torch or absent.
    """
    import torch

    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        rank = os.environ.get("LOCAL_RANK", "0")
        return f"cuda:{rank}" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        options = ["auto", "cpu", "cuda", "mps"]
        raise ConfigError(f"device={name}: no such device.{did_you_mean(name, options)}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={name}: {torch.cuda.device_count()} CUDA devices here; use cpu")
    if device.type == "mps" and not has_mps:
        raise ConfigError(f"device={name}: no MPS device here; use device=cpu")
    return name
