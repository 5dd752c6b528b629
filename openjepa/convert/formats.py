"""Every format by its name: what writes it, and what a given file or name turns out to be."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from openjepa.convert import hf, native, onnx, released, timm
from openjepa.convert.names import Imported, State, Told, finite
from openjepa.errors import UserError, first_line
from openjepa.models.encoder import Encoder


def write_hf(folder: Path, encoder: Encoder) -> str:
    hf.write(folder, encoder)
    return f"transformers.AutoModel.from_pretrained('{folder}')"


def write_onnx(folder: Path, encoder: Encoder) -> str:
    onnx.write(folder / "encoder.onnx", encoder)
    return f"onnxruntime.InferenceSession('{folder / 'encoder.onnx'}')"


def write_safetensors(folder: Path, encoder: Encoder) -> str:
    file = folder / f"{encoder.network}.safetensors"
    native.write(file, encoder)
    return f"openjepa.load('{file}')"


# From an encoder to files in an empty folder; each returns the line of Python that loads them.
WRITERS: dict[str, Callable[[Path, Encoder], str]] = {
    "hf": write_hf,
    "timm": timm.write,
    "onnx": write_onnx,
    "safetensors": write_safetensors,
}
FORMATS = (*WRITERS, "released")


def read(source: str, told: Told) -> Imported:
    """Whatever a path, or hf:NAME, turns out to be. Raises UserError."""
    if source.startswith("hf:"):
        return checked(hf.read(source.removeprefix("hf:"), told), source)
    path = Path(source)
    if path.is_dir():
        return checked(read_folder(path, told), source)
    if not path.is_file():
        raise UserError(f"{source}: no such file or folder (hf:ORGANISATION/NAME is a model of the Hugging Face hub)")
    if path.suffix == ".safetensors":
        state, header = read_safetensors(path)
        if native.KEY in header:
            return checked(native.read(state, header, source), source)
        return checked(timm.read(state, told, source, beside(path)), source)
    saved = released.read_pickle(path)
    if released.is_released(saved):
        return checked(released.read(saved, told, source), source)
    if isinstance(saved, Mapping) and "pos_embed" in saved:
        return checked(timm.read(dict(saved), told, source, beside(path)), source)
    raise UserError(
        f"{source} is neither a released checkpoint (encoder, predictor, target_encoder) nor an encoder's weights "
        f"(pos_embed, blocks.0…): it has {contents(saved)}"
    )


def read_folder(path: Path, told: Told) -> Imported:
    """A folder of Hugging Face's or timm's, told apart by its config.json."""
    about = config_json(path)
    if about.get("model_type") == "ijepa":
        return hf.read(str(path), told)
    if "architecture" in about and (path / "model.safetensors").exists():
        return timm.read(read_safetensors(path / "model.safetensors")[0], told, str(path), about)
    raise UserError(
        f"{path} is neither a run nor an exported model: it has no recipe.yaml and no config.json of a kind known"
    )


def beside(file: Path) -> dict[str, Any]:
    """timm's config.json in the folder of a file, if it is there."""
    about = config_json(file.parent)
    return about if "architecture" in about else {}


def config_json(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_safetensors(file: Path) -> tuple[State, Mapping[str, str]]:
    """Tensors and header. Raises UserError for a damaged file."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read as safetensors ({first_line(error)}): is it whole?") from error


def checked(found: Imported, where: str) -> Imported:
    for network, state in found.weights.items():
        finite(state, f"{where}'s {network}")
    return found


def contents(saved: Any) -> str:
    if not isinstance(saved, Mapping):
        return f"a {type(saved).__name__}"
    names = [str(name) for name in saved][:3]
    return ", ".join(names) if names else "nothing"
