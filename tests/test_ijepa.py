"""Claims about the method: the paper's order, the released numbers."""

import numpy as np
import pytest
import torch

from openjepa.masking import MaskingConfig, Masks, sample
from openjepa.methods.ijepa import IJEPA, LossConfig
from openjepa.models.predictor import PredictorConfig
from openjepa.models.vit import ViTConfig


def make(image: int = 32, context: str = "each", **loss) -> IJEPA:
    torch.manual_seed(0)
    config = ViTConfig(size="Ti", image_size=(image, image), patch_size=4, width=24, depth=2, heads=2)
    predictor = PredictorConfig(width=16, depth=2, context=context)
    return IJEPA(config, predictor, LossConfig(**loss))


def masks_of(**settings) -> Masks:
    return sample(MaskingConfig(**settings), (8, 8), 0, 0, np.arange(4))


def test_only_context_encoder_and_predictor_learn():
    method = make()
    method(torch.randn(4, 3, 32, 32), masks_of())["loss"].backward()
    assert all(p.grad is None for p in method.target_encoder.parameters())
    assert all(p.grad is not None for p in (*method.encoder.parameters(), *method.predictor.parameters()))


def test_the_target_encoder_sees_the_whole_image_and_is_layer_normed():
    method, images, masks = make(), torch.randn(4, 3, 32, 32), masks_of()
    features = method.target_encoder(images)
    targets = method.targets(images, masks)
    index = masks.targets[2, 1, 3]
    expected = torch.nn.functional.layer_norm(features[2, index], (24,))
    assert torch.allclose(targets[2, 1, 3], expected, atol=1e-6)


def test_losses_against_numbers():
    predictions = torch.tensor([[[[0.5, 3.0]], [[0.0, 0.0]]]])  # B 1, M 2, T 1, D 2
    targets = torch.zeros(1, 2, 1, 2)
    # smooth-L1: (0.5 * 0.25 + (3 - 0.5) + 0 + 0) / 4
    assert LossConfig(kind="released")(predictions, targets).mean().item() == pytest.approx(2.625 / 4)
    # the paper: mean over blocks of the summed squares
    assert LossConfig(kind="l2")(predictions, targets).mean().item() == pytest.approx(9.25 / 2)


def test_the_target_encoder_follows_by_moving_average():
    method = make()
    with torch.no_grad():
        for p in method.encoder.parameters():
            p.add_(1.0)
    before = [p.clone() for p in method.target_encoder.parameters()]
    method.after_step(0.9)
    for old, slow, fast in zip(before, method.target_encoder.parameters(), method.encoder.parameters(), strict=True):
        assert torch.allclose(slow, 0.9 * old + 0.1 * fast, atol=1e-6)


def test_packed_equals_even_where_all_contexts_are_as_long():
    method, images, masks = make(), torch.randn(4, 3, 32, 32), masks_of()
    b, c, k = masks.context.shape
    packed = Masks(masks.context, masks.targets, torch.full((b, c), k), b * c * k)
    assert method(images, packed)["loss"].item() == pytest.approx(method(images, masks)["loss"].item(), rel=1e-5)


def test_several_contexts_average_their_losses():
    method, images, masks = make(), torch.randn(4, 3, 32, 32), masks_of(contexts=2)
    both = method(images, masks)["loss"].item()
    apart = [method(images, Masks(masks.context[:, c : c + 1], masks.targets))["loss"].item() for c in (0, 1)]
    assert both == pytest.approx(sum(apart) / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("context", "masking", "recompute"),
    [
        ("each", "even", "selective"),
        pytest.param("each", "even", "none", marks=pytest.mark.slow),
        pytest.param("shared", "even", "full", marks=pytest.mark.slow),
        pytest.param("each", "packed", "none", marks=pytest.mark.slow),
    ],
)
def test_compiled_blocks_compute_the_same_and_are_compiled_once(context, masking, recompute):
    """Masks of other sizes, step after step: no new graph after the second; losses and gradients are the plain ones."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    plain, compiled = make(48, context), make(48, context)
    compiled.recompute_blocks(recompute)
    compiled.compile_blocks()
    graphs, shapes = [], set()
    for step in range(10):
        masks = sample(MaskingConfig(context=masking), (12, 12), 0, step, np.arange(4))
        images = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(step))
        shapes.add((masks.context.shape, masks.targets.shape))
        losses = [method(images, masks)["loss"] for method in (plain, compiled)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
        for method, loss in zip((plain, compiled), losses, strict=True):
            method.zero_grad()
            loss.backward()
        for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
            if theirs.grad is not None:
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
        graphs.append(counters["stats"]["unique_graphs"])
    assert len(shapes) >= 5
    assert 3 <= graphs[1] == graphs[-1] <= 8  # target encoder, context encoder, predictor
    assert list(compiled.state_dict()) == list(plain.state_dict())
