"""`openjepa bench train --against PEER`: the peers' own public I-JEPA modules, on the same images, masks and sizes.

A process for each turn, ours and theirs in alternation: neither warms the other's caches nor inherits its settings. The peer's
module is built as its documentation shows; masks, optimiser, precision and sizes, the predictor's heads too, are the same for both.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from openjepa.bench.clock import Rows, now, spread
from openjepa.bench.train import MASKS, Case, cases
from openjepa.engine.device import Precision, pick_autocast, pick_device, pick_precision
from openjepa.errors import UserError, last_line, nearest
from openjepa.masking import MaskingConfig, Masks, sample
from openjepa.methods.ijepa import IJEPA, LossConfig

Step = Callable[[Tensor, Masks], Tensor]  # from images and masks to the loss
Follow = Callable[[], None]  # what moves the target encoder

TURNS, STEPS, WARMUP = 3, 6, 2


def openjepa(case: Case) -> tuple[nn.Module, Step, Follow]:
    method = IJEPA(case.model, case.predictor, LossConfig())
    return method, lambda images, masks: method(images, masks)["loss"], lambda: method.after_step(0.996)


def compiled(case: Case) -> tuple[nn.Module, Step, Follow]:
    ours = openjepa(case)
    ours[0].compile_blocks()  # type: ignore[operator]
    return ours


def shared_context(case: Case) -> tuple[nn.Module, Step, Follow]:
    return openjepa(replace(case, predictor=replace(case.predictor, context="shared")))


def timm_encoder(case: Case) -> nn.Module:
    """The encoder that both peers wrap."""
    from timm.models.vision_transformer import VisionTransformer

    model = case.model
    return VisionTransformer(
        img_size=model.image_size, patch_size=model.patch_size, embed_dim=model.dim, depth=model.n_blocks,
        num_heads=model.n_heads, class_token=False, global_pool="", num_classes=0,
    )  # fmt: skip


def lightly(case: Case) -> tuple[nn.Module, Step, Follow]:
    """lightly's encoder, predictor and helpers; its training loop is an example in its documentation."""
    from lightly.models import utils
    from lightly.models.modules.ijepa_timm import IJEPAPredictorTIMM
    from lightly.models.modules.masked_vision_transformer_timm import MaskedVisionTransformerTIMM

    encoder = MaskedVisionTransformerTIMM(timm_encoder(case))
    encoder.mask_token.requires_grad_(False)  # of other methods
    target = copy.deepcopy(encoder).requires_grad_(False)
    predictor = IJEPAPredictorTIMM(
        num_patches=case.model.grid[0] * case.model.grid[1],
        depth=case.predictor.depth,
        mlp_dim=case.model.dim,
        predictor_embed_dim=case.predictor.width,
        num_heads=case.predictor.heads or case.model.n_heads,
    )

    def step(images: Tensor, masks: Masks) -> Tensor:
        blocks = list(masks.targets.unbind(1))
        with torch.no_grad():
            features = F.layer_norm(target.encode(images), (case.model.dim,))
            targets = utils.apply_masks(features, blocks)
        context = encoder.encode(images, idx_keep=masks.context[:, 0])
        return F.smooth_l1_loss(predictor(context, [masks.context[:, 0]], blocks), targets)

    return nn.ModuleList([encoder, predictor]), step, lambda: utils.update_momentum(encoder, target, 0.996)


def stable_pretraining(case: Case) -> tuple[nn.Module, Step, Follow]:
    """stable-pretraining's module; it predicts all blocks together, in one sequence, instead of each apart.

    Its predictor has heads of 64 and takes no other number of them.
    """
    from stable_pretraining.methods import IJEPA as Theirs

    module = Theirs(
        timm_encoder(case),
        predictor_embed_dim=case.predictor.width,
        predictor_depth=case.predictor.depth,
    ).train()

    def step(images: Tensor, masks: Masks) -> Tensor:
        drawn = SimpleNamespace(context_idx=masks.context[:, 0], target_idx=masks.targets.flatten(1))
        module.masking.forward = lambda *_: drawn
        loss: Tensor = module(images).loss
        return loss

    return module, step, module.encoder.update_teacher


OURS = {"openjepa": openjepa, "openjepa, compiled": compiled, "openjepa, shared context": shared_context}
PEERS = {"lightly": lightly, "stable-pretraining": stable_pretraining}


def like(peer: str, case: Case) -> Case:
    """The sizes that a peer can be built with."""
    if peer != "stable-pretraining":
        return case
    return replace(case, predictor=replace(case.predictor, heads=max(1, case.predictor.width // 64)))


def turn(who: str, case: Case, precision: Precision, steps: int = STEPS, warmup: int = WARMUP) -> list[float]:
    """Seconds of each step: forward, backward, fused AdamW, and what follows."""
    device = pick_device("auto")
    torch.manual_seed(0)
    module, step, follow = {**OURS, **PEERS}[who](case)
    module.to(device).train()
    optimizer = AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4, fused=True)
    autocast = pick_autocast(precision, device)
    images = torch.randn(case.batch, 3, *case.model.image_size, device=device)
    masks = [sample(MaskingConfig(), case.model.grid, 0, s, np.arange(case.batch)).to(device) for s in range(MASKS)]
    seconds = []
    for s in range(warmup + steps):
        start = now(device)
        with autocast():
            loss = step(images, masks[s % MASKS])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        follow()
        seconds.append(now(device) - start)
    return seconds[warmup:]


def against(peer: str) -> Rows:
    """Ours and a peer's in turn, each turn a process of its own. Raises UserError for a peer that is not here."""
    if peer not in PEERS:
        raise UserError(f"--against {peer}: one of {', '.join(PEERS)}{nearest(peer, PEERS)}")
    try:
        number = version(peer)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{peer} is not installed: uv run --group peers openjepa bench train --against {peer}"
        ) from error
    device = pick_device("auto")
    precision = pick_precision("auto", device)
    rows = []
    for i, case in enumerate(cases(device)):
        seconds: dict[str, list[float]] = {who: [] for who in (*OURS, peer)}
        for _ in range(TURNS):
            for who, taken in seconds.items():
                taken += in_its_own_process(who, peer, i, precision)
        theirs = median(seconds[peer])
        for who, taken in seconds.items():
            rows.append(
                {
                    "model": case.name,
                    "who": who if who in OURS else f"{who} {number}",
                    "precision": precision,
                    "images_per_s": case.batch / median(taken),
                    f"over_{peer}": theirs / median(taken),
                    **spread(taken),
                    "batch": case.batch,
                }
            )
    return rows


def in_its_own_process(who: str, peer: str, case: int, precision: Precision) -> list[float]:
    words = [sys.executable, "-m", "openjepa.bench.peers", who, peer, str(case), precision]
    ended = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "WANDB_MODE": "disabled"})
    if ended.returncode:
        raise UserError(f"{who} failed: {last_line(ended.stderr)}")
    found: list[float] = json.loads(ended.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    who, peer, case, precision = sys.argv[1:]
    print(json.dumps(turn(who, like(peer, cases(pick_device("auto"))[int(case)]), precision)))  # type: ignore[arg-type]
