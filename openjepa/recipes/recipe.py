"""A recipe: all the values that make a run, in YAML and out, refused at the door when they cannot be."""

from __future__ import annotations

import contextlib
import math
import reprlib
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar, Union

import yaml

from openjepa.data.augment import AugmentConfig, CropsConfig
from openjepa.data.decode import MODES
from openjepa.data.stream import DataConfig
from openjepa.decoder.rcdm import RCDMConfig
from openjepa.engine.device import TrainingPrecision
from openjepa.engine.monitors import MonitorsConfig
from openjepa.engine.optim import OptimConfig, ScheduleConfig
from openjepa.engine.run import MachineConfig
from openjepa.errors import UserError, nearest
from openjepa.masking import MaskingConfig, TokenMaskingConfig
from openjepa.methods.ibot import IBOTConfig
from openjepa.methods.ijepa import LossConfig
from openjepa.methods.mae import MAEConfig
from openjepa.models.predictor import PredictorConfig
from openjepa.models.vit import ViTConfig
from openjepa.recipes.methods import METHODS, parts, starting

T = TypeVar("T")

CHANGES_NO_RESULT = ("monitors", "machine", "rcdm.run", "data.max_bad")  # may differ when a run goes on


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One part for each place that reads it."""

    method: str = "ijepa"  # or mae, ibot, rcdm: see recipes/methods.py
    seed: int = 0
    init_from: str | None = None  # a run, or weights that can be imported, that a new run's networks begin with
    # or a run of its own, in RUN/first: its values over this one's
    first: dict[str, Any] = field(default_factory=dict, hash=False)
    # auto: bf16 where its matrix products are faster, settled when a run begins
    precision: TrainingPrecision = "auto"
    model: ViTConfig = field(default_factory=ViTConfig)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)  # ijepa
    loss: LossConfig = field(default_factory=LossConfig)  # ijepa
    masking: MaskingConfig = field(default_factory=MaskingConfig)  # ijepa, mae and rcdm
    mae: MAEConfig = field(default_factory=MAEConfig)
    ibot: IBOTConfig = field(default_factory=IBOTConfig)
    crops: CropsConfig = field(default_factory=CropsConfig)  # ibot
    token_masking: TokenMaskingConfig = field(default_factory=TokenMaskingConfig)  # ibot
    rcdm: RCDMConfig = field(default_factory=RCDMConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    monitors: MonitorsConfig = field(default_factory=MonitorsConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}: it must not be negative")
        if self.data.batch_size % self.optim.accumulate:
            raise UserError(
                f"data.batch_size {self.data.batch_size} must be divisible by optim.accumulate ({self.optim.accumulate})"
            )
        if self.model.channels not in MODES:
            raise UserError(f"model.channels is {self.model.channels}: images are read with 1, 3 or 4")
        if len(self.data.mean) != self.model.channels:
            raise UserError(
                f"data.mean has {len(self.data.mean)} numbers and model.channels is {self.model.channels}: give one a channel"
            )
        if self.method not in METHODS:
            raise UserError(
                f"method '{self.method}' is unknown: one of {', '.join(METHODS)}{nearest(self.method, METHODS)}"
            )
        METHODS[self.method].check(self)
        if self.first and self.init_from:
            raise UserError("first and init_from both say what a run begins with: leave one out")
        if (before := self.before()) and (changed := differing_encoders(before.model, self.model)):
            raise UserError(f"first has another encoder, which this one cannot begin with ({'; '.join(changed)})")

    def before(self) -> Recipe | None:
        """The run that comes first, with whose encoder this one begins. Raises UserError for values that cannot be."""
        if "first" in self.first:
            raise UserError("first.first: one run can come before another, no more")
        if not self.first:
            return None
        try:
            return from_dict(Recipe, self.first, "first", replace(self, first={}, init_from=None))
        except UserError as error:
            raise UserError(str(error) if "first." in str(error) else f"first: {error}") from error

    def others(self) -> set[str]:
        """The parts that belong to other methods."""
        return parts() - set(METHODS[self.method].parts)


# ---------------------------------------------------------------- in and out


def to_dict(value: Any) -> Any:
    """Dataclasses to plain dictionaries and lists, as YAML has them."""
    if is_dataclass(value):
        others = value.others() if isinstance(value, Recipe) else ()
        result = {f.name: to_dict(getattr(value, f.name)) for f in fields(value) if f.name not in others}
        if isinstance(value, ViTConfig):  # what the size implies is left to it, so that changing the size changes it
            result |= {name: None for name, implied in value.implied().items() if result[name] == implied}
        return result
    return [to_dict(v) for v in value] if isinstance(value, tuple) else value


def to_yaml(recipe: Recipe) -> str:
    return yaml.safe_dump(to_dict(recipe), sort_keys=False)


class Loader(yaml.SafeLoader):
    """Without aliases: a few lines of them stand for more values than memory holds."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.YAMLError(f"an alias in line {mark.line + 1}, and recipes have none: write it out")
        return super().compose_node(parent, index)


def from_yaml(text: str) -> Any:
    """Plain dictionaries, lists and values. Raises ValueError, in one line, for what is not YAML."""
    try:
        return yaml.load(text, Loader)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except (
        yaml.YAMLError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
    ) as error:  # the others: `!!int ""`, 2024-99-99
        raise ValueError(" ".join(str(error).split())) from error


def from_dict(kind: type[T], values: Any, path: str = "", base: T | None = None) -> T:
    """Plain dictionaries to a dataclass, over the values of `base`.

    Raises UserError with the field's path for an unknown key (naming the nearest) or a value of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{path or 'the recipe'} is {values!r}: expected keys and values")
    if kind is Recipe:
        base = typing.cast(T, of_method(values, typing.cast("Recipe | None", base)))
    hints = typing.get_type_hints(kind)
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    result: dict[str, Any] = {}
    for name, value in values.items():
        where = f"{path}.{name}" if path else str(name)
        if name not in known:
            raise UserError(f"unknown key '{where}'{suggest(str(name), where, known, path)}")
        hint = hints[name]
        if typing.get_origin(hint) is dict:
            if not isinstance(value, Mapping):
                raise UserError(f"{where} is {shown(value)}: expected keys and values")
            result[name] = merged(getattr(base, name, {}), value) if value else {}
        elif is_dataclass(hint):
            result[name] = from_dict(typing.cast(type, hint), value, where, getattr(base, name, None))
        else:
            result[name] = convert(hint, value, where)
    if base is not None:
        result = {name: getattr(base, name) for name in known} | result
        if isinstance(base, ViTConfig) and "size" in values:  # a size brings its own width, depth, heads
            result |= {n: values.get(n) for n in ("width", "depth", "heads", "mlp_ratio")}
    return kind(**result)


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values over others."""
    both = {
        k: merged(old[k], v) if isinstance(v, Mapping) and isinstance(old.get(k), Mapping) else v
        for k, v in new.items()
    }
    return {**old, **both}


def of_method(values: Mapping[str, Any], base: Recipe | None) -> Recipe | None:
    """What some values of a recipe are laid over: a recipe of the method that they name. Raises UserError for another's parts."""
    base = base or Recipe()
    name = values.get("method", base.method)
    if not isinstance(name, str) or name not in METHODS:
        return base  # refused with all other wrong values
    if name != base.method:
        base = starting(base, name)
    for part in base.others() & values.keys():
        whose = " and ".join(other for other, family in METHODS.items() if part in family.parts)
        raise UserError(f"'{part}' is a part of {whose}, and this recipe's method is {name}")
    return base


def suggest(name: str, where: str, known: list[str], path: str) -> str:
    """The nearest key: in the same part, or of that name in another."""
    if close := nearest(name, known):
        return close if not path else close.replace("'", f"'{path}.", 1)
    return nearest(where, all_keys())


def all_keys(kind: type = Recipe, path: str = "") -> list[str]:
    """Every key of a recipe, dotted."""
    hints = typing.get_type_hints(kind)
    keys: list[str] = []
    for f in fields(kind):
        nested = is_dataclass(hints[f.name])
        keys += all_keys(hints[f.name], f"{path}{f.name}.") if nested else [path + f.name]
    return keys


def shown(value: Any) -> str:
    """A value as a message has it: not all of a long one."""
    text = reprlib.repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def convert(hint: Any, value: Any, where: str) -> Any:
    """A YAML value as the annotated type. Raises UserError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return convert(next(a for a in args if a is not type(None)), value, where)
    if origin is Literal:
        if value in args:
            return value
        choices = ", ".join(repr(a) for a in args)
        raise UserError(f"{where} is {shown(value)}: one of {choices}{nearest(str(value), [str(a) for a in args])}")
    if origin is tuple:
        size = None if args[-1] is Ellipsis else len(args)
        if isinstance(value, int | float) and where == "model.image_size":
            value = [value, value]
        if size is None and isinstance(value, int | float | str):  # a list of one
            value = [value]
        if not isinstance(value, list | tuple) or (size is not None and len(value) != size):
            raise UserError(f"{where} is {shown(value)}: expected {'a list' if size is None else f'{size} numbers'}")
        kinds = args[:1] * len(value) if size is None else args
        return tuple(convert(k, v, where) for k, v in zip(kinds, value, strict=True))
    if isinstance(value, int) and abs(value) >= 2**63:
        raise UserError(f"{where} is {shown(value)}: expected a number of at most 64 bits")
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string
        with contextlib.suppress(ValueError):
            value = float(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where} is {value}: expected a finite number")
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise UserError(f"{where} is {shown(value)}: expected {'true or false' if hint is bool else hint.__name__}")


def override(recipe: Recipe, values: Mapping[str, str]) -> Recipe:
    """A recipe with some dotted keys changed: {"optim.lr": "1e-3"}."""
    return from_dict(Recipe, nested(values), base=recipe)


def nested(values: Mapping[str, str]) -> dict[str, Any]:
    """{"optim.lr": "1e-3"} to {"optim": {"lr": 1e-3}}. Raises UserError."""
    tree: dict[str, Any] = {}
    for path, text in values.items():
        *parents, name = path.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise UserError(f"--{path}: {part} was given a value of its own")
        node[name] = parse(path, text)
    return tree


def of_processes(recipe: Recipe, processes: int) -> Recipe:
    """A recipe whose batch size was that of one process, with that of a step of so many."""
    return replace(recipe, data=replace(recipe.data, batch_size=processes * recipe.data.batch_size))


def parse(path: str, text: str) -> Any:
    """A value from the command line; a list may be written 1,2 or [1, 2]. Raises UserError."""
    try:
        listed = "," in text and not text.lstrip().startswith(("[", "{"))
        return from_yaml(f"[{text}]" if listed else text)
    except ValueError as error:
        raise UserError(f"--{path} {text}: not a value") from error


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1e-3}} to {"optim.lr": 1e-3}."""
    if not isinstance(value, dict):
        return {path: value}
    return {k: v for n, item in value.items() for k, v in flat(item, f"{path}.{n}" if path else n).items()}


NO_WEIGHTS = ("size", "drop_path", "init", "depth_scaled_init")  # values of an encoder that no weight tells


def differing_encoders(old: ViTConfig, new: ViTConfig) -> list[str]:
    """The fields by which the weights of one's encoder are none of the other's, as `model.depth: 6 -> 12`."""
    a, b = (flat({"model": asdict(model)}) for model in (old, new))
    return [f"{k}: {a[k]} -> {b[k]}" for k in a if a[k] != b[k] and k.rpartition(".")[2] not in NO_WEIGHTS]


def differences(old: Recipe, new: Recipe) -> list[str]:
    """The fields that would change the result of a run, as `optim.lr: 0.001 -> 0.0005`."""
    if old.method != new.method:
        return [f"method: {old.method} -> {new.method}"]
    a, b = (flat(asdict(replace(recipe, first={}))) for recipe in (old, new))
    skipped = (*CHANGES_NO_RESULT, *(f"{part}." for part in old.others()))
    changed = [f"{k}: {a[k]} -> {b[k]}" for k in a if a[k] != b[k] and not k.startswith(skipped)]
    before, now = old.before(), new.before()
    if before is None or now is None:
        return changed if before is now else [*changed, f"first: {shown(old.first)} -> {shown(new.first)}"]
    return [*changed, *(f"first.{change}" for change in differences(before, now) if change not in changed)]
