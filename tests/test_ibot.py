"""Claims about iBOT: its loss and centres are the released code's; the rest of it does what its paper says."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from openjepa.engine.optim import OptimConfig, build_optimizer
from openjepa.masking import TokenMaskingConfig, TokenMasks, hide_tokens
from openjepa.methods.ibot import IBOT, IBOTConfig
from openjepa.models.vit import ViTConfig
from tests.test_parity import error, holds

MODEL = ViTConfig(size="Ti", image_size=(32, 32), patch_size=8, width=24, depth=2, heads=2, class_token=True)


def make(**values) -> IBOT:
    torch.manual_seed(0)
    method = IBOT(MODEL, IBOTConfig(**{"prototypes": 20, "hidden": 16, "bottleneck": 8} | values).of_run(100))
    method.train()
    return method


def batch(b: int = 4, small: int = 2) -> tuple:
    images, crops = torch.randn(b, 2, 3, 32, 32), torch.randn(b, small, 3, 16, 16)
    return images, hide_tokens(TokenMaskingConfig(), (4, 4), 2, 0, 0, np.arange(b), np.arange(b)), crops


def test_the_loss_and_the_centres_are_the_releases(golden: Path):
    about, tensors = json.loads((golden / "ibot_loss.json").read_text()), load_file(golden / "ibot_loss.safetensors")
    method = make(temperature_epochs=about["tau_warmup_epochs"] - 1)
    errors: dict[str, list[float]] = {"classes": [], "patches": [], "sum": [], "centres": []}
    for told in about["results"]:
        t = {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(f"e{told['epoch']}.")}
        method.begin_step(told["epoch"])
        assert method.temperatures == pytest.approx((told["tau_cls"], told["tau_patch"]))
        method.centres.copy_(torch.cat([t["center_cls_before"], t["center_patch_before"][0]]))
        b = len(t["student_cls"]) // 2

        def by_image(crops: torch.Tensor, b: int = b) -> torch.Tensor:
            """From crop by crop to image by image."""
            return crops.unflatten(0, (-1, b)).transpose(0, 1)

        student = torch.cat([by_image(t["student_cls"]), by_image(t["local_cls"])], 1)
        loss = method.class_loss(student, by_image(t["teacher_cls"])).mean()
        errors["classes"].append(abs(loss.item() / told["cls"] - 1))
        hidden = torch.cat([t["mask0"], t["mask1"]]).flatten(1).bool()
        where = hidden.flatten().nonzero()[:, 0]
        asked, target = (t[f"{who}_patch"].flatten(0, 1)[where] for who in ("student", "teacher"))
        of_patches = method.patch_loss(asked, target, hidden, where).mean()
        errors["patches"].append(abs(of_patches.item() / told["patch"] - 1))
        whole = method.config.class_weight * loss + method.config.patch_weight * of_patches
        errors["sum"].append(abs(whole.item() / told["loss"] - 1))
        means = torch.stack([t["teacher_cls"].mean(0), t["teacher_patch"].mean((0, 1))])
        method.after_step(0.996, 1.0, means)
        errors["centres"].append(error(method.centres, torch.cat([t["center_cls"], t["center_patch"][0]])))
    for name, found in errors.items():
        holds(f"iBOT {name}", found, 1e-5)


def test_the_loss_is_the_papers_sum_over_views_and_hidden_patches():
    method = make(class_weight=0.7, patch_weight=0.3, teacher_temperature=0.05)
    method.begin_step(100)
    method.centres.normal_()
    images, masks, small = batch(3)

    def logits(crop: torch.Tensor, encoder: str, head: str, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """Of one crop: of its class token, then of its patches."""
        instead = None if hidden is None else (hidden[None], method.mask_token)
        return getattr(method, head)(getattr(method, encoder).tokens(crop[None], hidden=instead))[0]

    def cross(teacher: torch.Tensor, student: torch.Tensor, centre: torch.Tensor, temperature: float) -> torch.Tensor:
        p = ((teacher - centre) / temperature).softmax(-1)
        return -(p * (student / 0.1).log_softmax(-1)).sum(-1)

    expected = []
    for image, hidden, others in zip(images, masks.hidden, small, strict=True):
        teacher = [logits(crop, "target_encoder", "target_head") for crop in image]
        student = [logits(crop, "encoder", "head", at) for crop, at in zip(image, hidden, strict=True)]
        views = [*student, *(logits(crop, "encoder", "head") for crop in others)]
        classes = [
            cross(teacher[q][0], v[0], method.centres[0], 0.05) for q in (0, 1) for i, v in enumerate(views) if i != q
        ]
        patches = [cross(teacher[q][1:][at], student[q][1:][at], method.centres[1], 0.07).sum() / max(1, int(at.sum()))
                   for q, at in enumerate(hidden)]  # fmt: skip
        assert len(classes) == 2 * 3
        expected.append(0.7 * torch.stack(classes).mean() + 0.3 * torch.stack(patches).mean())
    out = method(images, masks, small)
    assert torch.allclose(out["losses"], torch.stack(expected), rtol=1e-5)


def test_temperatures_rise_by_the_step_and_at_once_where_no_epochs_are_given():
    config = IBOTConfig(temperature_epochs=0.5, patch_temperature=0.06)
    assert config.temperatures(0) == pytest.approx((0.04, 0.04))
    assert config.temperatures(0.25) == pytest.approx((0.055, 0.05))
    assert config.temperatures(0.5) == config.temperatures(9) == pytest.approx((0.07, 0.06))
    assert IBOTConfig(temperature_epochs=0).temperatures(0) == pytest.approx((0.07, 0.07))


def test_only_the_student_learns_and_the_teacher_follows():
    method = make(norm_last_layer=False)
    out = method(*batch())
    out["loss"].backward()
    assert out["losses"].shape == (4,)
    assert out["loss"].item() == pytest.approx(out["losses"].mean().item(), rel=1e-6)
    learning = {name for name, p in method.named_parameters() if p.grad is not None}
    assert learning == {n for n, _ in method.named_parameters() if n.startswith(("encoder", "head", "mask_token"))}
    before = method.target_head.mlp[0].weight.clone()
    with torch.no_grad():
        method.head.mlp[0].weight.add_(1.0)
    method.after_step(0.9, 1.0, out["means"])
    assert torch.allclose(method.target_head.mlp[0].weight, before + 0.1, atol=1e-6)
    assert torch.allclose(method.centres, 0.1 * out["means"], atol=1e-6)


def test_a_step_that_is_not_finite_moves_no_centre():
    method = make()
    method.after_step(0.9, 0.0, torch.full((2, 20), float("nan")))
    assert not method.centres.any()


def test_hidden_patches_are_unseen_by_the_student_alone():
    method = make()
    images, masks, _ = batch()
    changed = images.clone()
    crop, patch = masks.hidden.nonzero()[0][:2].tolist(), int(masks.hidden.nonzero()[0][2])
    row, column = divmod(patch, 4)
    changed[crop[0], crop[1], :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 1
    flat = masks.hidden.flatten(0, 1)

    def student(x: torch.Tensor) -> torch.Tensor:
        return method.encoder.tokens(x.flatten(0, 1), hidden=(flat, method.mask_token))

    assert torch.equal(student(images), student(changed))
    assert not torch.equal(method.target_encoder(images.flatten(0, 1)), method.target_encoder(changed.flatten(0, 1)))


def test_without_the_patch_loss_it_is_dino():
    images, masks, small = batch()
    method = make(patch_weight=0.0)
    out = method(images, masks, small)
    out["loss"].backward()
    assert not out["means"][1].any()
    nothing = TokenMasks(torch.zeros_like(masks.hidden), 0)
    both = make()(images, nothing, small)
    assert both["loss"].item() == pytest.approx(make(patch_weight=0.0)(images, nothing, small)["loss"].item(), rel=1e-6)


def test_prototypes_keep_their_length_and_rest_at_first():
    method = make(freeze_last_layer_epochs=1)
    method(*batch())["loss"].backward()
    method.before_update(0.9)
    before = {name: p.clone() for name, p in method.head.named_parameters()}
    build_optimizer(method, OptimConfig(lr=0.1, weight_decay=0.5)).step()
    moved = {name for name, p in method.head.named_parameters() if not torch.equal(p, before[name])}
    assert "mlp.0.weight" in moved
    assert not {name for name in moved if name.startswith("last")}  # nor does weight decay move them
    assert torch.allclose(method.head.last.weight.norm(dim=1), torch.ones(20), atol=1e-5)
    method(*batch())["loss"].backward()
    method.before_update(1.0)
    assert any(p.grad is not None for p in method.head.last.parameters())


# ---------------------------------------------------------------- what is hidden


@pytest.mark.parametrize("shape", ["block", "random"])
def test_as_many_patches_are_hidden_as_asked_for(shape):
    config = TokenMaskingConfig(shape=shape)
    masks = hide_tokens(config, (14, 14), 2, 0, 0, np.arange(400), np.arange(400))
    share = masks.hidden.float().mean(-1).flatten()
    assert masks.total == int(masks.hidden.sum())
    assert (share > 0).float().mean().item() == pytest.approx(0.5, abs=0.05)  # half of the crops
    assert share.max() <= 0.5
    assert share[share > 0].mean().item() == pytest.approx(0.3, abs=0.03)
    neighbours = (masks.hidden.view(-1, 14, 14)[:, :, 1:] & masks.hidden.view(-1, 14, 14)[:, :, :-1]).sum()
    together = neighbours.item() / masks.total  # of a hidden patch, whether the one beside it is hidden too
    assert (together > 0.6) == (shape == "block")


def test_a_slot_has_its_masks_whoever_makes_them():
    config, slots = TokenMaskingConfig(), np.arange(16) + 32
    whole = hide_tokens(config, (8, 8), 2, 3, 2, slots, np.arange(16))
    part = hide_tokens(config, (8, 8), 2, 3, 2, slots, np.array([1, 5, 9]))
    assert torch.equal(part.hidden, whole.hidden[[1, 5, 9]])
    assert part.total == whole.rows(np.array([1, 5, 9])).total
