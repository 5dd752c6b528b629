"""A step that stopped a run, kept so that it can be computed once more.

RUN/bad_steps/step-00000120/ is a run of its own: the recipe, the weights and optimiser before the step, and the batch of each
rank (images as they were cropped, masks), so that no data is needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from openjepa import rng
from openjepa.data.stream import Batch
from openjepa.engine import checkpoint, parallel
from openjepa.engine.device import pick_autocast, pick_device
from openjepa.engine.fp8 import use_fp8
from openjepa.engine.optim import OptimConfig
from openjepa.engine.train import gradient_norm
from openjepa.engine.whole import write_whole
from openjepa.errors import UserError, first_line
from openjepa.masking import Masks, TokenMasks
from openjepa.methods.method import Method
from openjepa.models.encoder import Normalise
from openjepa.models.weights import load_strict
from openjepa.recipes.methods import inputs
from openjepa.recipes.recipe import Recipe, to_yaml


def dump(run: Path, recipe: Recipe, done: int, epoch: float, batch: Batch, name: Callable[[int], str], method: nn.Module,
         optimizer: Optimizer) -> Path:  # fmt: skip
    """Keep the step after `done` steps, on every rank its batch. name: of the image with an index.

    Returns the folder. Raises UserError.
    """
    out = run / "bad_steps" / f"step-{done + 1:08}"
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.save(out, done, method, optimizer, {"epoch": epoch})
    masks = {f"masks.{k}": v for k, v in vars(batch.masks).items() if isinstance(v, Tensor)}
    tensors = {"images": batch.images, "small": batch.small, "indices": torch.from_numpy(batch.indices), **masks}
    save_file(
        {k: v.contiguous() for k, v in tensors.items() if v is not None},
        out / f"batch-{parallel.rank():05}.safetensors",
        {"names": json.dumps([name(i) for i in batch.indices.tolist()])},
    )
    if parallel.rank() == 0:
        write_whole(out / "recipe.yaml", to_yaml(recipe))
    return out


def replay(kept: Path) -> Iterator[str]:
    """Compute a kept step once more, in one process, and say in lines what is not finite in it. Raises UserError."""
    from openjepa.recipes.pretrain import build, saved_recipe

    recipe = saved_recipe(kept)
    _, found = checkpoint.locate(kept)
    files = sorted(kept.glob("batch-*.safetensors"))
    if not files:
        raise UserError(f"{kept} is no kept step: it has no batch-*.safetensors")
    device = pick_device(recipe.machine.device)
    method = build(recipe)
    load_strict(method, found.weights(), str(found.path))
    method = method.to(device).train()
    if recipe.precision == "fp8":
        yield use_fp8(method, device)
    method.begin_step(found.state().get("epoch", 0.0))
    normalise = Normalise(recipe.data.mean, recipe.data.std).to(device)
    autocast = pick_autocast(recipe.precision, device)
    yield f"step {found.step + 1}, {len(files)} {'part' if len(files) == 1 else 'parts'}, {recipe.precision} on {device}"
    bad = 0
    for rank, file in enumerate(files):
        batch, names = read(file)
        torch.manual_seed((rng.key(recipe.seed, "step") + found.step) % 2**63)
        method.share(rank, len(files))
        for part in batch.parts(recipe.optim.accumulate):
            here = part.to(device)
            with autocast():
                out = method(*inputs(here, normalise))
            finite = out["losses"].isfinite().cpu()
            for i in (~finite).nonzero()[:, 0].tolist():
                bad += 1
                loss, where = alone(method, normalise, autocast, part, i)
                yield f"image {names[part.indices[i]]}: loss {out['losses'][i]:g}, alone {loss:g}{where}"
            out["loss"].backward()
            parameters = [p for p in method.parameters() if p.grad is not None]
            wild = [n for n, p in method.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
            yield f"rank {rank}: loss {out['loss']:g}, gradient norm {gradient_norm(parameters, OptimConfig()):g}" + (
                f", not finite in {len(wild)} parameters, the last of backward {wild[0]}" if wild else ""
            )
            method.zero_grad()
    yield "all losses are finite here" if not bad else f"{bad} images have a loss that is not finite"


def read(file: Path) -> tuple[Batch, dict[int, str]]:
    """A kept batch, and the names of its images by their indices. Raises UserError."""
    try:
        with safe_open(file, "pt") as opened:
            names = json.loads((opened.metadata() or {}).get("names", "[]"))
            tensors: dict[str, Tensor] = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        kept = {name.removeprefix("masks."): tensors[name] for name in tensors if name.startswith("masks.")}
        counted = kept.get("hidden", kept.get("lengths"))  # those of which the host knows how many
        total = 0 if counted is None else int(counted.sum())
        masks = TokenMasks(kept["hidden"], total) if "hidden" in kept else Masks(**kept, total=total)
        indices = tensors["indices"].numpy()
        known = dict(zip(indices.tolist(), names or map(str, indices), strict=True))  # kept without names before
        return Batch(tensors["images"], masks, indices, small=tensors.get("small")), known
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({first_line(error)})") from error


@torch.no_grad()
def alone(method: Method, normalise: nn.Module, autocast: object, batch: Batch, i: int) -> tuple[float, str]:
    """The loss of one image by itself, and which module's output was the first that is not finite."""
    device = next(method.parameters()).device
    first: list[str] = []

    def look(name: str) -> object:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if not first and isinstance(output, Tensor) and not output.isfinite().all():
                first.append(name)

        return hook

    hooks = [m.register_forward_hook(look(n)) for n, m in method.named_modules() if n]
    try:
        with autocast():  # type: ignore[operator]
            loss = float(method(*inputs(batch.rows(slice(i, i + 1)).to(device), normalise))["loss"])
    finally:
        for hook in hooks:
            hook.remove()
    return loss, f", first not finite after {first[0]}" if first else ""
