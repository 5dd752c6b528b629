"""Claims about MAE: it computes what the released code computes, and its decoder may look in any order."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from openjepa.convert.mae import own, pixels
from openjepa.masking import Masks
from openjepa.methods.mae import MAE, MAEConfig
from openjepa.models.vit import ViTConfig
from tests.test_parity import error, holds


def ours(name: str) -> str:
    """A released parameter's name here."""
    return ".".join(own(name)).replace("cls_token", "prefix_tokens")


def as_ours(name: str, tensor: Tensor) -> Tensor:
    if name.startswith("decoder_pred"):  # its rows are pixels
        return pixels(tensor, (-1, 3))
    return tensor.flatten(0, 1) if name == "cls_token" else tensor


@pytest.fixture
def released(golden: Path) -> tuple[dict, dict[str, Tensor], MAE, Masks]:
    about, tensors = json.loads((golden / "mae_tiny.json").read_text()), load_file(golden / "mae_tiny.safetensors")
    model = ViTConfig(size="Ti", image_size=(32, 32), patch_size=8, width=48, depth=2, heads=3, class_token=True)
    method = MAE(model, MAEConfig(decoder_width=32, decoder_depth=2, decoder_heads=4))
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    for name, positions in (("pos_embed", method.encoder.positions), ("decoder_pos_embed", method.decoder.positions)):
        stored = state.pop(name)[0]
        assert not stored[0].any()  # the class token has no place
        assert torch.allclose(stored[1:], positions, atol=1e-6)
    method.load_state_dict({ours(k): as_ours(k, v) for k, v in state.items()})
    order = tensors["noise"].argsort(1)
    return about, tensors, method, Masks(order[:, None, :4], order[:, None, 4:])


def test_the_encoder_and_the_decoder_are_the_releases(released):
    _, tensors, method, masks = released
    latent = method.encoder.tokens(tensors["images"], masks.context[:, 0])
    holds("MAE latent", [error(latent, tensors["latent"])], 1e-5)
    hidden = tensors["mask"].bool()
    painted = torch.zeros(4, 16, 192).scatter(
        1, masks.targets[:, 0, :, None].expand(-1, -1, 192), method.painted(tensors["images"], masks).detach()
    )
    assert hidden.gather(1, masks.targets[:, 0]).all()
    holds("MAE prediction", [error(painted[hidden], pixels(tensors["pred"][hidden].T, (-1, 3)).T)], 1e-5)
    everywhere = method.decoder(latent, masks.context[:, 0], torch.arange(16).expand(4, 1, 16))  # asked for all patches
    assert everywhere.shape == (4, 1, 16, 192)


def test_both_losses_and_every_gradient_are_the_releases(released):
    about, tensors, method, masks = released
    loss = method(tensors["images"], masks)["loss"]
    holds("MAE loss", [abs(loss.item() / about["loss_norm_pix"] - 1)], 1e-6)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in method.named_parameters()}
    expected = {k.removeprefix("grad."): v for k, v in tensors.items() if k.startswith("grad.")}
    assert len(expected) == len(gradients)
    errors = [error(gradients[ours(name)], as_ours(name, theirs)) for name, theirs in expected.items()]
    holds(f"MAE gradients, all {len(errors)}", errors, 2e-5)
    raw = MAE(method.encoder.config, MAEConfig(decoder_width=32, decoder_depth=2, decoder_heads=4, normalised=False))
    raw.load_state_dict(method.state_dict())
    holds(
        "MAE loss, raw pixels", [abs(raw(tensors["images"], masks)["loss"].item() / about["loss_raw_pixels"] - 1)], 1e-6
    )


def test_matrices_begin_as_in_the_release():
    torch.manual_seed(0)
    method = MAE(ViTConfig(size="Ti", image_size=(32, 32), patch_size=4, class_token=True), MAEConfig())
    weight = method.encoder.blocks[0].mlp.fc1.weight
    assert weight.abs().max().item() == pytest.approx((6 / sum(weight.shape)) ** 0.5, rel=1e-3)  # Xavier, uniform
    assert not method.encoder.blocks[0].mlp.fc1.bias.any()
    patches = method.encoder.patch_embed.proj
    assert patches.weight.abs().max().item() == pytest.approx((6 / (192 + 48)) ** 0.5, rel=1e-3)  # as one matrix
    assert patches.bias.abs().max() > 0
    assert method.decoder.mask_token.std().item() == pytest.approx(0.02, rel=0.1)
