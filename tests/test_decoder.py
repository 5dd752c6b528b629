"""Claims about the RCDM decoder: its loss is the paper's, it heeds what it is told, and it paints in place."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from openjepa.data.sources import open_source
from openjepa.data.stream import Steps
from openjepa.decoder.condition import Condition
from openjepa.decoder.faithful import OTHER, POSITIONS, faithfulness, moved
from openjepa.decoder.paint import Sampling, paint, scheduler
from openjepa.decoder.place import cut, paste, snapped
from openjepa.decoder.rcdm import RCDM, Denoiser
from openjepa.masking import Masks, sample
from openjepa.recipes import decoding
from openjepa.recipes.decoder import small
from openjepa.recipes.exchange import load_run
from openjepa.recipes.methods import METHODS, decoder_of
from openjepa.recipes.named import RECIPES
from openjepa.recipes.recipe import override
from tests.helpers import PAINTER


def fresh(trained: Path, **values: object) -> RCDM:
    """An untrained decoder whose weights are nowhere zero."""
    run = load_run(trained)
    recipe = decoding.recipe_for(small(replace(PAINTER, **values), 2), str(trained), run)
    method = decoder_of(recipe, run)
    with torch.no_grad():
        for parameter in (*method.denoiser.parameters(), *method.average.parameters()):
            parameter.add_(
                0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    return method


def batch_of(trained: Path, folder: Path, method: RCDM) -> tuple[Tensor, Masks]:
    recipe = decoding.recipe_for(small(PAINTER, 2), str(trained), load_run(trained))
    recipe = override(recipe, {"data.batch_size": "8"})
    batch = Steps(open_source(str(folder)), recipe.data, METHODS["rcdm"].views(recipe), 0).batch(0)
    return method.normalise(batch.images), batch.masks


@pytest.mark.parametrize(("name", "sides", "attends", "millions"), [
    ("rcdm_64", [64, 32, 16, 8], [0, 0, 1, 1], 101),
    ("rcdm_128", [128, 64, 32, 16, 8], [0, 0, 1, 1, 1], 422),
])  # fmt: skip
def test_large_decoders_are_adms(name, sides, attends, millions):
    config = RECIPES[name]().rcdm
    assert config.sides == sides
    with torch.device("meta"):
        denoiser = Denoiser(config, 3, 1280)
        out = denoiser(torch.zeros(2, 3, sides[0], sides[0]), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 1280))
    assert out.shape == (2, 6, sides[0], sides[0])  # the noise and its variance
    assert [hasattr(block, "attentions") for block in denoiser.unet.down_blocks] == [bool(a) for a in attends]
    assert round(sum(p.numel() for p in denoiser.parameters()) / 1e6) == millions


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("predict", ["noise", "velocity"])
def test_the_loss_is_the_written_out_formula(trained, folder, predict):
    method = fresh(trained, predict=predict)
    images, masks = batch_of(trained, folder, method)
    torch.manual_seed(3)
    out = method(images, masks)
    torch.manual_seed(3)
    t, noise = torch.randint(1000, (8,)), torch.randn(8, 3, 8, 8)
    clean, condition = method.target(images, masks), method.condition(images, masks)
    for i in range(8):
        kept = math.prod(1 - (1e-4 + (0.02 - 1e-4) * s / 999) for s in range(int(t[i]) + 1))
        noisy = math.sqrt(kept) * clean[i] + math.sqrt(1 - kept) * noise[i]
        velocity = math.sqrt(kept) * noise[i] - math.sqrt(1 - kept) * clean[i]
        asked = noise[i] if predict == "noise" else velocity
        guess = method.denoiser(noisy[None], t[i : i + 1], condition[i : i + 1])[0]
        assert out["losses"][i].item() == pytest.approx((guess - asked).square().mean().item(), rel=1e-4)
    assert out["loss"].item() == pytest.approx(out["losses"].mean().item(), rel=1e-6)


@pytest.mark.parametrize("predict", ["noise", "velocity"])
def test_the_bound_is_the_divergence_of_gaussians_and_teaches_variances_alone(trained, predict):
    method = fresh(trained, learn_variance=True, predict=predict)
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.rand(5, 3, 8, 8, generator=generator) * 2 - 1, torch.randn(5, 3, 8, 8, generator=generator)
    out = torch.randn(5, 6, 8, 8, generator=generator, requires_grad=True)
    clean[0, 0, 0, 0], clean[0, 0, 0, 1] = -1, 1  # whose bins have no end
    t = torch.tensor([0, 1, 10, 500, 999])
    found = method.bound(clean, t, noise, out)
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bar = torch.cumprod(1 - beta, 0)
    for i, step in enumerate(t.tolist()):
        before = bar[step - 1] if step else torch.tensor(1.0)
        x = bar[step].sqrt() * clean[i] + (1 - bar[step]).sqrt() * noise[i]

        def back(start: Tensor, x: Tensor = x, step: int = step, before: Tensor = before) -> Tensor:
            """The mean of x one step earlier by Bayes: two Gaussians, weighed by their precisions."""
            if not step:
                return start
            a, b = (1 - beta[step]) / beta[step], 1 / (1 - before)
            return (a * x / (1 - beta[step]).sqrt() + b * before.sqrt() * start) / (a + b)

        guess, logits = out[i].detach().double().split(3)
        start = (x - (1 - bar[step]).sqrt() * guess) / bar[step].sqrt()
        if predict == "velocity":
            start = bar[step].sqrt() * x - (1 - bar[step]).sqrt() * guess
        place = max(step, 1)
        floor = beta[place] * (1 - bar[place - 1]) / (1 - bar[place])
        share = (logits + 1) / 2
        model = Normal(
            back(start),
            (share * beta[step].log() + (1 - share) * floor.log()).mul(0.5).exp(),
        )
        if step:
            expected = kl_divergence(Normal(back(clean[i].double()), floor.sqrt()), model)
        else:
            pixel = clean[i].double()
            upper, lower = model.cdf(pixel + 1 / 255), model.cdf(pixel - 1 / 255)
            upper[pixel >= 0.999], lower[pixel <= -0.999] = 1, 0
            expected = -(upper - lower).clamp(min=1e-12).log()
        assert found[i].item() == pytest.approx(expected.mean().item() / math.log(2), rel=2e-3, abs=1e-6)
    found.sum().backward()
    assert (out.grad[:, :3] == 0).all()
    assert (out.grad[:, 3:] != 0).any()


def test_it_begins_at_zero_as_adm_does(trained):
    method = decoder_of(decoding.recipe_for(small(PAINTER, 2), str(trained), load_run(trained)), load_run(trained))
    assert (method.denoiser(torch.randn(2, 3, 8, 8), torch.tensor([5, 900]), torch.randn(2, 24)) == 0).all()


def test_only_the_denoiser_learns_and_its_average_follows(trained, folder):
    method = fresh(trained).train()
    images, masks = batch_of(trained, folder, method)
    method(images, masks)["loss"].backward()
    assert all(p.grad is not None for p in method.denoiser.parameters())
    assert all(p.grad is None for p in [*method.average.parameters(), *method.condition.parameters()])
    assert {name.partition(".")[0] for name in method.state_dict()} == {"denoiser", "average"}  # no frozen network
    assert not method.condition.networks.training
    before = [p.clone() for p in method.average.parameters()]
    method.after_step(0.75)
    for old, new, fast in zip(before, method.average.parameters(), method.denoiser.parameters(), strict=True):
        assert torch.allclose(new, 0.75 * old + 0.25 * fast, atol=1e-6)


def test_the_representation_is_heeded(trained):
    method = fresh(trained)
    noisy, t = torch.randn(1, 3, 8, 8), torch.tensor([300])
    a, b = method.denoiser(noisy, t, torch.zeros(1, 24)), method.denoiser(noisy, t, torch.ones(1, 24))
    assert (a - b).abs().max() > 1e-3


def test_every_process_draws_its_own_of_the_same_numbers(trained, folder):
    method = fresh(trained)
    images, masks = batch_of(trained, folder, method)
    torch.manual_seed(0)
    whole = method(images, masks)["losses"]
    halves = []
    for rank in range(2):
        rows = slice(4 * rank, 4 * rank + 4)
        method.share(rank, 2)
        torch.manual_seed(0)
        halves.append(method(images[rows], masks.rows(rows))["losses"])
    assert torch.allclose(torch.cat(halves), whole, atol=1e-5)


# ---------------------------------------------------------------- what it is told


def test_a_prediction_knows_nothing_of_the_block_and_the_oracle_nothing_else_is(trained, folder):
    method = fresh(trained)
    images, masks = batch_of(trained, folder, method)
    networks = method.condition.networks
    inside = torch.zeros(8, 60, dtype=torch.bool).scatter(1, masks.targets[:, 0], True).view(8, 1, 6, 10)
    hidden = inside.repeat_interleave(4, 2).repeat_interleave(4, 3)
    other = torch.where(hidden, torch.randn_like(images), images)
    for of, heeds in (("prediction", False), ("block", True), ("image", True)):
        condition = Condition(networks, of)
        assert torch.allclose(condition(images, masks), condition(other, masks), atol=1e-5) != heeds
    context = networks.encoder(images, masks.context[:, 0])
    expected = networks.predictor(context, masks.context[:, 0], masks.targets).mean((1, 2))
    assert torch.allclose(method.condition(images, masks), expected, atol=1e-6)
    assert masks.context.shape[2] + masks.targets.shape[2] == 60  # all that is outside is seen


def test_a_place_enters_by_its_mask_tokens(trained, folder):
    method = fresh(trained)
    images, masks = batch_of(trained, folder, method)
    elsewhere = Masks(masks.context, moved(masks.targets, (6, 10)))
    assert elsewhere.targets.shape == masks.targets.shape
    assert (elsewhere.targets != masks.targets).any(-1).all()
    assert not torch.allclose(method.condition(images, elsewhere), method.condition(images, masks), atol=1e-4)


# ---------------------------------------------------------------- pixels


@pytest.mark.parametrize("size", [3, 8, 16])
def test_a_block_is_cut_as_torch_resizes_crops(size):
    images = torch.rand(2, 3, 24, 40)
    boxes = torch.tensor([[4.0, 8.0, 16.0, 24.0], [0.0, 0.0, 40.0, 24.0]])
    squares = cut(images, boxes, size)
    for image, square, (left, top, right, bottom) in zip(images, squares, boxes.int().tolist(), strict=True):
        crop = image[None, :, top:bottom, left:right]
        assert torch.allclose(square, F.interpolate(crop, (size, size), mode="bilinear", antialias=True)[0], atol=1e-5)


def test_pasting_changes_the_box_and_nothing_else():
    images, squares = torch.rand(2, 3, 24, 40), torch.rand(2, 3, 8, 8)
    boxes = [(4, 8, 12, 16), (0, 0, 16, 8)]
    pasted = paste(images, squares, boxes)
    assert torch.equal(pasted[0, :, 8:16, 4:12], squares[0])  # of the same size: pixel by pixel
    for before, after, (left, top, right, bottom) in zip(images, pasted, boxes, strict=True):
        outside = torch.ones(24, 40, dtype=torch.bool)
        outside[top:bottom, left:right] = False
        assert torch.equal(before[:, outside], after[:, outside])
        assert not torch.equal(before, after)


def test_a_box_is_widened_to_whole_patches_inside_of_what_is_seen():
    rng = np.random.default_rng(0)
    for _ in range(300):
        width, height = rng.integers(60, 400, 2).tolist()
        w, h = rng.integers(1, 20, 2).tolist()
        x, y = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
        place = snapped((x, y, w, h), (width, height), (6, 10), 4)
        left, top, right, bottom = place.window
        assert min(left, top) >= -1e-6
        assert right <= width + 1e-6
        assert bottom <= height + 1e-6
        assert (right - left) / (bottom - top) == pytest.approx(10 / 6)
        patch = (right - left) / 10
        for low, span, start, (first, end) in ((x, w, left, place.columns), (y, h, top, place.rows)):
            assert start + first * patch <= low + 1e-6
            assert low + span <= start + end * patch + 1e-6
            assert (end - first) * patch < span + 2 * patch  # and no wider than it must be
        assert len(place.block) + place.masks().context.shape[2] == 60


# ---------------------------------------------------------------- sampling


def test_schedules_have_the_steps_of_the_release():
    ddpm = scheduler(Sampling(), PAINTER).timesteps.tolist()
    assert (len(ddpm), ddpm[0], ddpm[-1]) == (100, 999, 0)
    assert {a - b for a, b in pairwise(ddpm)} == {10, 11}  # evenly, as fractions allow
    assert scheduler(Sampling(sampler="ddim"), PAINTER).timesteps.tolist() == list(range(990, -1, -10))


def test_an_ancestral_step_is_that_of_the_retained_times():
    made = scheduler(Sampling(), PAINTER)
    bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    x, guess = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    t, before = made.timesteps[40].item(), made.timesteps[41].item()
    beta = 1 - bar[t] / bar[before]
    clean = ((x - (1 - bar[t]).sqrt() * guess) / bar[t].sqrt()).clamp(-1, 1)
    mean = (bar[before].sqrt() * beta * clean + (1 - beta).sqrt() * (1 - bar[before]) * x) / (1 - bar[t])
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    expected = mean + (beta * (1 - bar[before]) / (1 - bar[t])).sqrt() * noise
    found = made.step(guess, t, x, generator=[torch.Generator().manual_seed(5)]).prev_sample
    assert torch.allclose(found, expected.float(), atol=1e-4)


@pytest.mark.parametrize(("sampler", "predict"), [("ddpm", "noise"), ("ddim", "noise"), ("ddpm", "velocity")])
def test_samples_are_functions_of_the_seed_and_rows_share_their_noise(trained, sampler, predict):
    method = fresh(trained, learn_variance=True, predict=predict)
    conditions = torch.randn(1, 24).repeat(2, 1)
    sampling = Sampling(sampler=sampler, steps=4)
    first = paint(method, conditions, 2, sampling)
    assert first.shape == (2, 2, 3, 8, 8)
    assert first.min() >= 0
    assert first.max() <= 1
    assert torch.equal(first, paint(method, conditions, 2, sampling))
    assert torch.allclose(first[0], first[1], atol=1e-5)  # the same condition, the same noise
    assert not torch.allclose(first[0, 0], first[0, 1], atol=1e-2)
    assert not torch.allclose(first, paint(method, conditions, 2, replace(sampling, seed=1)), atol=1e-2)
    assert torch.allclose(first[:, :1], paint(method, conditions, 1, sampling), atol=1e-5)  # however many are drawn


def test_a_decoder_that_has_learned_is_true_to_its_images(trained):
    method = fresh(trained, of="block", predict="velocity", width=16, multipliers=(1,), attention=()).train()
    colours = torch.rand(16, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    images = (255 * colours).to(torch.uint8).expand(-1, -1, 24, 40).contiguous()
    recipe = decoding.recipe_for(small(PAINTER, 2), str(trained), load_run(trained))
    blocks = sample(recipe.masking, (6, 10), 0, 0, np.arange(POSITIONS))
    masks = blocks.rows(np.arange(16) % POSITIONS)
    normalised = method.normalise(images)
    optimizer = torch.optim.AdamW(method.denoiser.parameters(), lr=3e-3)
    torch.manual_seed(0)
    for _ in range(200):
        method(normalised, masks)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(0.98)
    found = faithfulness(method.eval(), images, blocks, 16, 2, Sampling(steps=20))
    for control in (OTHER, "the mean"):
        ahead = {answer.metric: answer for answer in found.ahead(control)}
        assert ahead["mrr"].interval[0] > 0
        assert ahead["pixel_rmse"].interval[1] < 0
        assert ahead["distance"].interval[1] < 0
