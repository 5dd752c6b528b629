"""Claims about encoder, predictor and attention."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from openjepa.errors import UserError
from openjepa.models import layers
from openjepa.models.layers import (
    PatchEmbed,
    Ragged,
    attention,
    interpolate_positions,
    plain_attention,
    sincos_positions,
)
from openjepa.models.predictor import Predictor, PredictorConfig
from openjepa.models.vit import SIZES, ViT, ViTConfig


def tiny_config(**changes) -> ViTConfig:
    return ViTConfig(
        **{"size": "Ti", "image_size": (32, 24), "patch_size": 4, "width": 24, "depth": 3, "heads": 2} | changes
    )


def awake(model: torch.nn.Module) -> torch.nn.Module:
    """Weights large enough that every part matters to the output."""
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


@pytest.mark.parametrize(("name", "grid"), [("grid14.dim768", (14, 14)), ("grid16.dim1280", (16, 16)),
                                            ("grid28.dim384", (28, 28)), ("grid8.dim96", (8, 8))])  # fmt: skip
def test_positions_equal_the_released_ones(golden, name, grid):
    expected = load_file(golden / "sincos_every7th.safetensors")[name]
    assert torch.allclose(sincos_positions(grid, expected.shape[1])[::7], expected, atol=1e-6)


def test_positions_tell_columns_from_rows_on_any_grid():
    positions = sincos_positions((5, 9), 32).view(5, 9, 32)
    assert torch.equal(positions[0, 3, :16], positions[4, 3, :16])  # same column
    assert torch.equal(positions[2, 0, 16:], positions[2, 8, 16:])  # same row
    assert len(positions.reshape(45, 32).unique(dim=0)) == 45


def test_interpolation_keeps_the_grid_and_moves_smoothly():
    positions = sincos_positions((8, 8), 32)
    assert torch.equal(interpolate_positions(positions, (8, 8), (8, 8)), positions)
    doubled = interpolate_positions(positions, (8, 8), (16, 16)).view(16, 16, 32)
    # the middle of four new places is the old place between them
    middle = (doubled[6, 6] + doubled[6, 7] + doubled[7, 6] + doubled[7, 7]) / 4
    assert torch.allclose(middle, positions.view(8, 8, 32)[3, 3], atol=0.06)


def test_patches_embed_as_the_convolution_they_are():
    embed = PatchEmbed(4, 3, 24)
    images = torch.randn(2, 3, 32, 24)
    expected = F.conv2d(images, embed.proj.weight, embed.proj.bias, stride=4).flatten(2).transpose(1, 2)
    assert torch.allclose(embed(images), expected, atol=1e-5)
    visible = torch.tensor([[5, 0, 47], [1, 2, 3]])
    picked = torch.stack([expected[i, visible[i]] for i in range(2)])
    assert torch.allclose(embed(images, visible), picked, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [7, 64, 600])
def test_every_attention_kernel_computes_the_formula(dtype, tokens):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, tokens, 16) for _ in range(3))
    expected = plain_attention(q, k, v)
    got = attention(q.to(dtype), k.to(dtype), v.to(dtype)).float()
    assert torch.allclose(got, expected, atol=1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("long", [False, True])
def test_packed_sequences_are_encoded_as_if_alone(monkeypatch, long):
    if long:  # the fused kernel with a mask, at lengths where it would not be chosen
        monkeypatch.setattr(layers, "short", lambda q: False)
    vit = awake(ViT(tiny_config()))
    images = torch.randn(3, 3, 32, 24)
    lengths = torch.tensor([7, 3, 5])
    visible = torch.stack([torch.randperm(48)[:7] for _ in range(3)])
    ragged = Ragged(torch.arange(7) < lengths[:, None], 15)
    packed = ragged.pad(vit(images, visible, ragged))
    for i, n in enumerate(lengths):
        alone = vit(images[i : i + 1], visible[i : i + 1, :n])
        assert torch.allclose(packed[i, :n], alone[0], atol=1e-4)


def test_packed_predictions_equal_those_made_alone():
    config = tiny_config()
    predictor = awake(Predictor(PredictorConfig(width=16, depth=2), config))
    lengths, visible = torch.tensor([6, 2]), torch.stack([torch.randperm(48)[:6] for _ in range(2)])
    targets = torch.randint(0, 48, (2, 3, 4))
    context = torch.randn(2, 6, 24)
    ragged = Ragged(torch.arange(6) < lengths[:, None], 8)
    together = predictor(ragged.pack(context), visible, targets, ragged)
    for i, n in enumerate(lengths):
        alone = predictor(context[i : i + 1, :n], visible[i : i + 1, :n], targets[i : i + 1])
        assert torch.allclose(together[i], alone[0], atol=1e-4)


def test_blocks_are_predicted_apart():
    """One pass for each block: what another block asks changes nothing (section 3)."""
    config = tiny_config()
    predictor = awake(Predictor(PredictorConfig(width=16, depth=2), config))
    context, visible = torch.randn(1, 6, 24), torch.randperm(48)[None, :6]
    targets = torch.randint(0, 48, (1, 3, 4))
    alone = predictor(context, visible, targets[:, 1:2])
    assert torch.allclose(predictor(context, visible, targets)[:, 1:2], alone, atol=1e-5)


def test_a_shared_context_is_a_mask_on_who_sees_whom():
    """One sequence, context first: all see the context, and mask tokens those of their block."""
    config, (k, m, t) = tiny_config(), (6, 3, 4)
    predictor = awake(Predictor(PredictorConfig(width=16, depth=3, context="shared"), config))
    context, visible = torch.randn(2, k, 24), torch.stack([torch.randperm(48)[:k] for _ in range(2)])
    targets = torch.randint(0, 48, (2, m, t))
    block_of = torch.tensor([0] * k + [1 + i // t for i in range(m * t)])
    sees = (block_of == 0) | (block_of[:, None] == block_of)
    positions = predictor.get_buffer("positions")
    seen = predictor.embed(context) + positions[visible]
    x = torch.cat([seen, predictor.mask_token + positions[targets.flatten(1)]], dim=1)
    for block in predictor.blocks:
        q, k_, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, config.n_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = layers.plain_attention(q, k_, v, sees).transpose(1, 2).flatten(-2)
        x = x + block.attn.proj(attended)
        x = x + block.mlp(block.norm2(x))
    expected = predictor.proj(predictor.norm(x[:, k:])).unflatten(1, (m, t))
    got = predictor(context, visible, targets)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    joint = awake(Predictor(PredictorConfig(width=16, depth=3), config))
    joint.load_state_dict(predictor.state_dict())
    assert not torch.allclose(joint(context, visible, targets), got, atol=1e-3)  # the paper's context sees its block


def test_the_final_block_of_the_predictor_asks_for_its_targets_alone():
    """Outputs and every gradient are those of the whole block, whose context tokens nobody looks at."""
    block = layers.Block(24, 2).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(3, 9, 24, dtype=torch.float64, requires_grad=True)
    learning = [x, *block.parameters()]
    whole, last = block(x)[:, -4:], block(x, last=4)
    torch.testing.assert_close(last, whole, rtol=1e-12, atol=1e-12)
    both = [torch.autograd.grad(out.square().sum(), learning) for out in (whole, last)]
    torch.testing.assert_close(both[1], both[0], rtol=1e-10, atol=1e-10)


def test_hidden_patches_do_not_reach_the_context():
    vit = awake(ViT(tiny_config()))
    images, visible = torch.randn(1, 3, 32, 24), torch.arange(6)[None]
    changed = images.clone()
    changed[..., 4:, :] = 9.0  # below the first row of patches
    assert torch.equal(vit(images, visible), vit(changed, visible))


@pytest.mark.parametrize("changes", [{"class_token": True}, {"registers": 4}, {"layer_scale": 1e-2}, {"qk_norm": True},
                                     {"channels": 1}, {"channels": 5}, {"drop_path": 0.5}])  # fmt: skip
def test_options_train_and_return_patches_alone(changes):
    config = tiny_config(**changes)
    vit = ViT(config).train()
    out = vit(torch.randn(2, config.channels, 32, 24))
    assert out.shape == (2, 48, 24)
    out.square().mean().backward()
    assert all(p.grad is not None for p in vit.parameters())


def test_drop_path_is_off_outside_training():
    vit = ViT(tiny_config(drop_path=0.9))
    x = torch.randn(4, 3, 32, 24)
    vit.train()
    assert not torch.equal(vit(x), vit(x))
    vit.eval()
    assert torch.equal(vit(x), vit(x))


def test_other_image_sizes_are_encoded_and_odd_ones_refused():
    vit = awake(ViT(tiny_config()))
    assert vit(torch.randn(1, 3, 64, 40)).shape == (1, 160, 24)
    with pytest.raises(ValueError, match="do not divide"):
        vit(torch.randn(1, 3, 30, 24))


def test_the_last_intermediate_layer_is_the_output():
    vit = awake(ViT(tiny_config(class_token=True)))
    x = torch.randn(2, 3, 32, 24)
    outputs = vit.intermediate(x, vit.last(2))
    assert len(outputs) == 2
    assert torch.equal(outputs[-1], vit(x))


@pytest.mark.parametrize("name", ["B", "L"])
def test_parameter_counts_are_the_released_ones(golden, name):
    import json

    about = json.loads((golden / "models.json").read_text())[{"B": "vit_base_224_16", "L": "vit_large_224_16"}[name]]
    with torch.device("meta"):
        vit = ViT(ViTConfig(size=name))
    assert sum(p.numel() for p in vit.parameters()) == about["encoder_params"]
    shapes = {k: list(v.shape) for k, v in vit.state_dict().items()}
    assert {k: v for k, v in shapes.items() if not k.startswith("blocks.") or k.startswith("blocks.0.")} == {
        k: v
        for k, v in about["shapes"].items()
        if k != "pos_embed"  # ours are computed, not stored
    }


def test_sizes_are_the_papers():
    assert SIZES["H"][:3] == (1280, 32, 16)
    assert SIZES["G"] == (1408, 40, 16, 48 / 11)
    with torch.device("meta"):
        assert ViT(ViTConfig(size="G", depth=1)).blocks[0].mlp.fc1.weight.shape == (6144, 1408)


def test_initialisation_is_what_the_release_trains():
    vit = ViT(ViTConfig(size="S", depth=2))
    for name, p in vit.named_parameters():
        if name.endswith("bias"):
            assert p.abs().max() == 0
        elif p.ndim > 1:
            assert abs(p.std().item() - 0.02) < 1e-3
    scaled = ViT(ViTConfig(size="S", depth=2, depth_scaled_init=True))
    assert abs(scaled.blocks[1].mlp.fc2.weight.std().item() - 0.01) < 1e-3


def test_xavier_weights_are_as_large_as_their_layers_are_narrow():
    config = ViTConfig(size="S", patch_size=4, image_size=(16, 16), depth=1, init="xavier")
    predictor = Predictor(PredictorConfig(width=48, depth=1), config)
    for network in (ViT(config), predictor):
        for name, p in network.named_parameters():
            if name.endswith("bias"):
                assert p.abs().max() == 0
            elif p.ndim > 1 and "token" not in name:
                out, into = p.flatten(1).shape
                assert p.abs().max().item() == pytest.approx((6 / (out + into)) ** 0.5, rel=0.02), name


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"patch_size": 5}, "does not divide"),
        ({"patch_size": 0}, "does not divide"),
        ({"size": "XL"}, "one of Ti, S"),
        ({"width": 25}, "divisible"),
        ({"depth": 0}, "above 0"),
    ],
)
def test_impossible_models_are_refused(changes, says):
    with pytest.raises(UserError, match=says):
        tiny_config(**changes)
