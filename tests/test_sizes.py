"""Claims about sizes: the paper's networks have its widths, depths and heads, and shapes tell them apart."""

import json

import pytest
import torch

import openjepa
from openjepa.convert.names import Told, encoder_config, mlp_ratio
from openjepa.models.vit import SIZES, ViT, ViTConfig
from openjepa.recipes import ijepa


def test_known_sizes_are_told_by_their_shapes():
    for size, (width, depth, heads, ratio) in SIZES.items():
        with torch.device("meta"):
            config = ViTConfig(size=size, image_size=(224, 224), patch_size=16)
            state = ViT(config).state_dict() | {"pos_embed": torch.empty(1, 196, width)}
        found = encoder_config(state, Told(), "it")
        assert found == config
        assert (found.n_blocks, found.n_heads, found.mlp_ratio) == (depth, heads, ratio)


@pytest.mark.parametrize("size", ["B", "L"])
def test_parameters_and_shapes_of_the_released_encoders(golden, size):
    name = {"B": "vit_base_224_16", "L": "vit_large_224_16"}[size]
    theirs = json.loads((golden / "models.json").read_text())[name]
    with torch.device("meta"):
        vit = ViT(ViTConfig(size=size))
    assert sum(p.numel() for p in vit.parameters()) == theirs["encoder_params"]
    own = {k: list(v.shape) for k, v in vit.state_dict().items()}
    listed = {k: v for k, v in theirs["shapes"].items() if k != "pos_embed"}  # of one block
    assert {k: own[k] for k in listed} == listed
    assert list(vit.get_buffer("positions")[None].shape) == theirs["shapes"]["pos_embed"]


@pytest.mark.parametrize(
    ("recipe", "width", "depth", "heads", "hidden", "grid", "predictor"),
    [
        ("ijepa_vitb16", 768, 12, 12, 3072, 14, 6),
        ("ijepa_vitl16", 1024, 24, 16, 4096, 14, 12),
        ("ijepa_vith14", 1280, 32, 16, 5120, 16, 12),
        ("ijepa_vith16_448", 1280, 32, 16, 5120, 28, 12),
        ("ijepa_vitg16_in22k", 1408, 40, 16, 6144, 14, 16),
    ],
)
def test_the_papers_sizes(recipe, width, depth, heads, hidden, grid, predictor):
    """Protocols, E.1 and E.2: built without memory on the meta device."""
    made = ijepa.RECIPES[recipe]()
    with torch.device("meta"):
        method = openjepa.IJEPA(made.model, made.predictor, made.loss)
    assert len(method.encoder.blocks) == depth
    assert method.encoder.blocks[0].attn.heads == heads == method.predictor.blocks[0].attn.heads
    assert method.encoder.blocks[-1].mlp.fc1.weight.shape == (hidden, width)
    assert method.encoder.get_buffer("positions").shape == (grid * grid, width)
    assert len(method.predictor.blocks) == predictor
    assert method.predictor.embed.weight.shape == (384, width)


@pytest.mark.parametrize(("hidden", "width"), [(704, 960), (3904, 896), (79, 24)])
def test_any_hidden_width_has_a_ratio(hidden, width):
    assert int(width * mlp_ratio(width, hidden)) == hidden
