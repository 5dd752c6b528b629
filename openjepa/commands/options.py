"""What the commands share: options, recipes by name, values of the command line."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from openjepa.errors import UserError, nearest

SPEC = "folder, FILE.parquet, shard-{0000..0009}.tar, hf:NAME[:SPLIT], torchvision:NAME[:SPLIT], clevr:ROOT[:SPLIT] or scenes[:N]"
COMPILE = "torch.compile the blocks that make features: half a minute first, then up to a tenth faster on a CPU"

AUTO = "ijepa_auto"


def looking(p: argparse.ArgumentParser) -> None:
    """How an encoder looks at images."""
    p.add_argument(
        "--network",
        choices=("target_encoder", "encoder"),
        help="target_encoder unless told; a run of MAE has an encoder alone",
    )
    p.add_argument(
        "--crop", type=float, metavar="SHARE", help="0.875 is resize 256, crop 224; 1, or the named set's, unless told"
    )
    p.add_argument("--squash", action="store_true", help="the whole image without keeping its aspect, as for CLEVR")
    p.add_argument("--precision", choices=("auto", "bf16", "fp32"), help="of encoder and probes: the run's unless told")
    p.add_argument("--device", default="auto", help="cpu, cuda, mps; auto takes a GPU if there is one")
    p.add_argument(
        "--workers", type=int, metavar="N", help="processes that load images: beside a GPU up to 8 unless told"
    )


def chosen(args: argparse.Namespace, processes: int = 1, values: Mapping[str, str] | None = None) -> tuple[Any, bool]:
    """The recipe that --recipe or --config names, or None; and whether its batch size is that of one process.

    values: that will be laid over it.
    """
    if args.recipe and args.config:
        raise UserError("give --recipe or --config, not both")
    if args.recipe == AUTO and processes > 1:
        raise UserError(for_one_process())
    if args.recipe == AUTO and hasattr(args, "budget"):
        return automatic(args.data, args.budget, values), False
    if args.recipe:
        return named(args.recipe), False
    return read(Path(args.config)) if args.config else (None, False)


def for_one_process() -> str:
    """Why it does not choose for several processes, or for a machine that a job will run on."""
    return f"{AUTO} chooses for one process here: openjepa recipes {AUTO} --data SPEC > recipe.yaml, then --config recipe.yaml"


def automatic(data: str | None, budget: str | None, values: Mapping[str, str] | None = None) -> Any:
    """A recipe for these images; says why."""
    from openjepa.recipes.auto import choose

    if not data:
        raise UserError(f"{AUTO} chooses by the images: give --data SPEC: {SPEC}")
    found = choose(data, budget or "30min", values)
    for what, why in found.reasons:
        print(f"# {what}: {why}", flush=True)
    return found.recipe


def named(name: str) -> Any:
    from openjepa.recipes.named import RECIPES

    if name not in RECIPES:
        raise UserError(f"unknown recipe '{name}'{nearest(name, [AUTO, *RECIPES])} (openjepa recipes lists them)")
    return RECIPES[name]()


def read(file: Path) -> tuple[Any, bool]:
    from openjepa.convert import recipe as released
    from openjepa.recipes.recipe import Recipe, from_dict

    values = read_yaml(file)
    if theirs := released.is_released(values):
        translated = released.translate(values)
        for what, keys in (("not used here", released.unused(values)), ("not in it, so ours", released.unsaid(values))):
            if keys:
                print(f"{file.name} is a released recipe; {what}: {', '.join(keys)}", file=sys.stderr)
        try:
            return from_dict(Recipe, translated), theirs
        except UserError as error:
            raise UserError(f"{file.name}: {released.in_their_words(str(error))}") from error
    try:
        return from_dict(Recipe, values), theirs
    except UserError as error:
        raise UserError(f"{file.name}: {error}") from error


def read_yaml(file: Path) -> Any:
    from openjepa.recipes.recipe import from_yaml

    try:
        return from_yaml(file.read_text())
    except OSError as error:
        raise UserError(f"--config {file}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--config {file} is not YAML: {error}") from error


def height_and_width(text: str | None) -> tuple[int, int] | None:
    """224,320 to (224, 320)."""
    from openjepa.convert.names import Told
    from openjepa.recipes.recipe import from_dict, parse

    return from_dict(Told, {"image_size": parse("image-size", text)}, "model").image_size if text else None


def whole_numbers(name: str, text: str | None, count: int) -> Any:
    """3,4 to (3, 4)."""
    if text is None:
        return None
    words = text.split(",")
    if len(words) != count or not all(word.strip().removeprefix("-").isdecimal() for word in words):
        raise UserError(f"{name} {text}: give {count} whole numbers with commas between them")
    return tuple(map(int, words))


def pairs(rest: list[str]) -> dict[str, str]:
    """--optim.lr 1e-3 --masking.targets=4 to {"optim.lr": "1e-3", …}."""
    values: dict[str, str] = {}
    words = iter(rest)
    for word in words:
        if not word.startswith("--"):
            raise UserError(f"unexpected argument '{word}'")
        name, equals, value = word[2:].partition("=")
        if not equals:
            value = next(words, "")
            if not value or value.startswith("--"):
                raise UserError(f"--{name} needs a value")
        values[name] = value
    return values


def refuse(rest: list[str]) -> None:
    if rest:
        raise UserError(f"unexpected argument '{rest[0]}'")


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Among the processes that were launched beside this one. A signal ends it with its own status, and says that it can go on."""
    from openjepa.engine import parallel
    from openjepa.engine.launch import joined
    from openjepa.engine.run import Interrupted

    try:
        with joined():
            yield
    except Interrupted as stop:
        if parallel.launched()[0] == 0:
            print(f"stopped: {stop}; the same command goes on", file=sys.stderr)
        sys.exit(stop.status)
