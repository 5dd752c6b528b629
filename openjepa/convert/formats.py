"""Every format by its name: what writes it, and what a given file or name turns out to be."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from openjepa.convert import hf, mae, native, onnx, released, timm
from openjepa.convert.names import Imported, State, Told, tensors
from openjepa.errors import UserError, first_line
from openjepa.models.encoder import Encoder


def write_hf(folder: Path, encoder: Encoder) -> str:
    hf.write(folder, encoder)
    return f"transformers.AutoModel.from_pretrained({str(folder)!r})"


def write_hf_mae(folder: Path, whole: Imported) -> str:
    hf.write_mae(folder, whole)
    return f"transformers.AutoModelForPreTraining.from_pretrained({str(folder)!r})"


def write_mae(folder: Path, whole: Imported) -> str:
    file = folder / "checkpoint.pth"
    mae.write(file, whole)
    return f"torch.load({str(file)!r}, weights_only=True)['model']"


def write_onnx(folder: Path, encoder: Encoder) -> str:
    onnx.write(folder / "encoder.onnx", encoder)
    return f"onnxruntime.InferenceSession({str(folder / 'encoder.onnx')!r})"


def write_safetensors(folder: Path, encoder: Encoder) -> str:
    file = folder / f"{encoder.network}.safetensors"
    native.write(file, encoder)
    return f"openjepa.load({str(file)!r})"


# From an encoder to files in an empty folder; each returns the line of Python that loads them.
WRITERS: dict[str, Callable[[Path, Encoder], str]] = {
    "hf": write_hf,
    "timm": timm.write,
    "onnx": write_onnx,
    "safetensors": write_safetensors,
}
# The same of a MAE with its decoder.
MAE_WRITERS: dict[str, Callable[[Path, Imported], str]] = {"hf": write_hf_mae, "released": write_mae}
FORMATS = (*WRITERS, "released")


def read(source: str, told: Told) -> Imported:
    """Whatever a path, or hf:NAME, turns out to be. Raises UserError, in one line whatever the file holds."""
    try:
        found = (
            read_hub(source.removeprefix("hf:"), told) if source.startswith("hf:") else read_path(Path(source), told)
        )
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{source} is not what it looks like: {type(error).__name__}: {first_line(error)}") from error
    return replace(
        found, weights={network: {k: v.float() for k, v in state.items()} for network, state in found.weights.items()}
    )


def read_hub(name: str, told: Told) -> Imported:
    return read_folder(hf.download(name), told)


def read_path(path: Path, told: Told) -> Imported:
    if path.is_dir():
        return read_folder(path, told)
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder (hf:ORGANISATION/NAME is a model of the Hugging Face hub)")
    if path.suffix == ".onnx":
        raise UserError(f"{path} is a graph that cannot be read back: give the run, or use it with onnxruntime")
    if path.suffix == ".safetensors":
        state, header = read_safetensors(path)
        if native.KEY in header:
            return native.read(state, header, str(path))
        if native.PREDICTOR in header:
            raise UserError(f"{path} is a predictor, which no encoder is in")
        return timm.read(state, told, str(path), beside(path))
    saved = released.read_pickle(path)
    if released.is_released(saved):
        return released.read(saved, told, str(path))
    if mae.is_mae(saved):
        return mae.read(saved, told, str(path))
    if isinstance(saved, Mapping) and "pos_embed" in saved:
        return timm.read(tensors(saved, str(path)), told, str(path), beside(path))
    raise UserError(
        f"{path} is neither a released checkpoint (encoder, predictor, target_encoder; or model) nor an encoder's weights "
        f"(pos_embed, blocks.0…): it has {contents(saved)}"
    )


def read_folder(path: Path, told: Told) -> Imported:
    """A folder of Hugging Face's or timm's, told apart by its config.json, or one that holds a single file of weights."""
    if (path / "recipe.yaml").exists():
        raise UserError(f"{path} is a run: export it to take its weights elsewhere, or go on with it as it is")
    about = config_json(path / "config.json")
    if about.get("model_type") == "ijepa":
        return hf.read(about, config_json(path / "preprocessor_config.json"), weights_of(path), told, str(path))
    if about.get("model_type") == "vit_mae":
        return hf.read_mae(about, config_json(path / "preprocessor_config.json"), weights_of(path), told, str(path))
    if "architecture" in about:
        return timm.read(weights_of(path), told, str(path), about)
    if kind := about.get("model_type"):
        raise UserError(f"{path} is a model of type '{kind}', not 'ijepa' or 'vit_mae'")
    files = [file for file in path.iterdir() if file.suffix in (".safetensors", ".tar", ".pth", ".onnx")]
    if len(files) == 1:
        return read_path(files[0], told)
    raise UserError(
        f"{path} is neither a run nor an exported model: it has no recipe.yaml, config.json or single file of weights"
    )


def weights_of(folder: Path) -> State:
    """All weights of a Hugging Face or timm folder, in one file or several."""
    if files := whole_set(folder, "model", "safetensors"):
        return {name: tensor for file in files for name, tensor in read_safetensors(file)[0].items()}
    if files := whole_set(folder, "pytorch_model", "bin"):
        return {k: v for file in files for k, v in tensors(released.read_pickle(file), str(file)).items()}
    raise UserError(f"{folder} has no model.safetensors and no pytorch_model.bin")


def whole_set(folder: Path, stem: str, ending: str) -> list[Path]:
    """The one file, or all of several (model-00001-of-00003), or none. Raises UserError where some of several are missing."""
    if (one := folder / f"{stem}.{ending}").exists():
        return [one]
    files = sorted(folder.glob(f"{stem}-*-of-*.{ending}"))
    count = int(files[0].stem.rpartition("-")[2]) if files else 0
    if len(files) != count:
        raise UserError(f"{folder} has {len(files)} of the {count} files {stem}-*-of-{count:05}.{ending}: is it whole?")
    return files


def beside(file: Path) -> dict[str, Any]:
    """timm's config.json in the folder of a file, if it is there."""
    about = config_json(file.parent / "config.json")
    return about if "architecture" in about else {}


def config_json(file: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is no file. Raises UserError for a damaged one."""
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON ({first_line(error)})") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} holds no JSON object")
    return found


def read_safetensors(file: Path) -> tuple[State, Mapping[str, str]]:
    """Tensors and header. Raises UserError for a damaged file."""
    try:
        with safe_open(file, framework="pt") as opened:
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            header = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read as safetensors ({first_line(error)}): is it whole?") from error
    return tensors(state, str(file)), header


def contents(saved: Any) -> str:
    if not isinstance(saved, Mapping):
        return f"a {type(saved).__name__}"
    names = [str(name) for name in saved][:3]
    return ", ".join(names) if names else "nothing"
