"""Claims about the RCDM decoder: its loss is the paper's, it paints in place, resumes to the bit, and knows whose it is."""

import json
import math
import re
import shutil
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import openjepa
from openjepa.data.sources import open_source
from openjepa.data.stream import Steps
from openjepa.decoder.condition import Condition
from openjepa.decoder.faithful import OTHER, OWN, POSITIONS, REAL, WRONG, faithfulness, moved
from openjepa.decoder.paint import Sampling, paint, scheduler
from openjepa.decoder.place import cut, paste, snapped
from openjepa.decoder.rcdm import RCDM, RCDMConfig
from openjepa.engine.checkpoint import checkpoints
from openjepa.engine.run import read_metrics
from openjepa.errors import UserError
from openjepa.masking import Masks, sample
from openjepa.recipes import decoding
from openjepa.recipes.decoder import small
from openjepa.recipes.decoding import Decoder, check, load_decoder, show, train
from openjepa.recipes.exchange import load_run
from openjepa.recipes.methods import METHODS, decoder_of
from openjepa.recipes.pretrain import saved_recipe
from openjepa.recipes.recipe import override
from tests.helpers import command, encoded, refused, same
from tests.test_methods import recipe_of
from tests.test_parallel import ENVIRONMENT, launch

QUIET = Console(quiet=True)
TINY = RCDMConfig(size=8, width=8, multipliers=(1, 2), blocks=1, attention=(4,))
VALUES = {
    "data.batch_size": "8",
    "schedule.epochs": "2",
    "schedule.ema": "0.5,0.5",
    "machine.keep": "9",
    "machine.checkpoint_every": "0.4",
    "monitors.log_every": "1",
    "precision": "fp32",
}
FEW = Sampling(steps=4)


@pytest.fixture(scope="module")
def decoded(trained: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny decoder of the tiny run, every checkpoint kept."""
    out = tmp_path_factory.mktemp("decoded") / "decoder"
    train(str(trained), str(folder), out, small(TINY, 2), VALUES, QUIET)
    return out


@pytest.fixture(scope="module")
def loaded(trained: Path, decoded: Path) -> Decoder:
    return load_decoder(str(trained), str(decoded), "cpu")


def fresh(trained: Path, **values: object) -> RCDM:
    """An untrained decoder whose weights are nowhere zero."""
    run = load_run(trained)
    recipe = decoding.recipe_for(small(replace(TINY, **values), 2), str(trained), run)
    method = decoder_of(recipe, run)
    with torch.no_grad():
        for parameter in (*method.denoiser.parameters(), *method.average.parameters()):
            parameter.add_(
                0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    return method


def batch_of(trained: Path, folder: Path, method: RCDM) -> tuple[Tensor, Masks]:
    recipe = decoding.recipe_for(small(TINY, 2), str(trained), load_run(trained))
    recipe = override(recipe, {"data.batch_size": "8"})
    batch = Steps(open_source(str(folder)), recipe.data, METHODS["rcdm"].views(recipe), 0).batch(0)
    return method.normalise(batch.images), batch.masks


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
    method = decoder_of(decoding.recipe_for(small(TINY, 2), str(trained), load_run(trained)), load_run(trained))
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
    ddpm = scheduler(Sampling(), TINY).timesteps.tolist()
    assert (len(ddpm), ddpm[0], ddpm[-1]) == (100, 999, 0)
    assert {a - b for a, b in pairwise(ddpm)} == {10, 11}  # evenly, as fractions allow
    assert scheduler(Sampling(sampler="ddim"), TINY).timesteps.tolist() == list(range(990, -1, -10))


def test_an_ancestral_step_is_that_of_the_retained_times():
    made = scheduler(Sampling(), TINY)
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


# ---------------------------------------------------------------- the engine


def test_a_decoder_trains_logs_and_asks_for_no_features(decoded):
    records = read_metrics(decoded)
    assert len(records) == 10
    assert all("loss" in record and "context_tokens" in record for record in records)
    assert not any("feature_rank" in record or "knn_accuracy" in record for record in records)
    (weights,) = {name.partition(".")[0] for name in checkpoints(decoded)[-1].weights()} - {"denoiser"}
    assert weights == "average"


def test_a_stopped_decoder_ends_in_the_same_bits(trained, decoded, folder, tmp_path):
    again, moved_run = tmp_path / "again", tmp_path / "elsewhere"
    shutil.copytree(decoded, again)
    shutil.copytree(trained, moved_run)
    for found in checkpoints(again)[1:]:
        shutil.rmtree(found.path)
    train(str(moved_run), str(folder), again, None, {}, QUIET)  # wherever the run lies
    ours, theirs = checkpoints(again)[-1], checkpoints(decoded)[-1]
    assert ours.step == theirs.step == 10
    assert same(ours.weights(), theirs.weights())
    assert same(ours.optimizer(), theirs.optimizer())
    assert saved_recipe(again).rcdm.run == str(moved_run)


def test_another_run_is_refused_by_its_fingerprint(trained, decoded, folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    shutil.rmtree(checkpoints(other)[-1].path)
    with pytest.raises(UserError, match="made for another encoder"):
        load_decoder(str(other), str(decoded))
    with pytest.raises(UserError, match="made for another encoder"):
        train(str(other), str(folder), decoded, None, {}, QUIET)
    for source in (decoded, decoded / "checkpoints" / "step-00000010"):
        with pytest.raises(UserError, match="is a decoder and holds no encoder"):
            openjepa.load(source)
    with pytest.raises(UserError, match="is a decoder and holds no encoder"):
        load_run(decoded)


TOGETHER = """
import sys
from pathlib import Path
from rich.console import Console
from openjepa.engine.launch import joined
from openjepa.recipes.decoding import train
from tests.test_decoder import TINY, VALUES, small
run, data, out = sys.argv[1:]
with joined():
    for name, more in (("ddp", {}), ("fsdp", {"machine.strategy": "fsdp", "machine.recompute": "full"})):
        train(run, data, Path(out) / name, small(TINY, 2), VALUES | more, Console(quiet=True))
"""


@pytest.mark.slow
def test_two_processes_make_the_decoder_of_one(trained, decoded, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", str(Path(__file__).parents[1]))
    done = launch(2, TOGETHER, tmp_path, trained, folder, tmp_path)
    assert done.returncode == 0, done.err
    alone = checkpoints(decoded)[-1].weights()
    for name in ("ddp", "fsdp"):
        weights = checkpoints(tmp_path / name)[-1].weights()
        assert weights.keys() == alone.keys()
        assert all(torch.allclose(weights[k], alone[k], atol=1e-3) for k in alone)


# ---------------------------------------------------------------- commands


def test_the_papers_figure_is_made(trained, decoded, folder, monkeypatch, capsys, tmp_path):
    out = tmp_path / "figures" / "samples.png"
    words = ["decode", "sample", str(trained), str(folder), str(folder / "red" / "00.png"), "--rows", "2", "--samples", "3",
             "--steps", "3", "--decoder", str(decoded), "--device", "cpu", "--each"]  # fmt: skip
    status, _, error = command(monkeypatch, capsys, *words, "--out", str(out))
    assert (status, error) == (0, "")
    about = json.loads(Image.open(out).text["openjepa"])
    assert (about["seed"], about["steps"], about["sampler"], about["decoder_step"]) == (0, 3, "ddpm", 10)
    assert about["images"] == ["blue/00.png", "blue/01.png", str(folder / "red" / "00.png")]
    assert len(list(out.parent.glob("samples-*.png"))) == 9
    left, top, right, bottom = about["boxes"][2]
    given = np.asarray(Image.open(folder / "red" / "00.png")).astype(int)
    painted = np.asarray(Image.open(out.with_name("samples-2-1.png"))).astype(int)
    differs = (given != painted).any(-1)
    assert differs[top:bottom, left:right].any()
    differs[top:bottom, left:right] = False
    assert not differs.any()
    again = out.with_name("again.png")
    command(monkeypatch, capsys, *words[:-1], "--out", str(again))
    assert (np.asarray(Image.open(out)) == np.asarray(Image.open(again))).all()


def test_an_image_is_completed_at_its_own_size(trained, decoded, monkeypatch, capsys, tmp_path):
    picture = tmp_path / "large.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 160, 3)).astype(np.uint8)).save(picture)
    out = tmp_path / "done.png"
    words = ["decode", "complete", str(trained), str(picture), "--decoder", str(decoded), "--box", "20,20,50,30",
             "--out", str(out), "--steps", "2", "--samples", "2", "--each", "--device", "cpu"]  # fmt: skip
    status, told, error = command(monkeypatch, capsys, *words)
    assert (status, error) == (0, "")
    assert "widened to whole patches: 16,16,64,48" in told
    made = np.asarray(Image.open(tmp_path / "done-0-1.png")).astype(int)
    assert made.shape == (96, 160, 3)
    differs = (made != np.asarray(Image.open(picture))).any(-1)
    differs[16:64, 16:80] = False
    assert not differs.any()


def test_faithfulness_is_told_with_controls_and_intervals(trained, decoded, folder, tmp_path):
    random = tmp_path / "random"
    train(str(trained), str(folder), random, small(replace(TINY, networks="random"), 2), VALUES | {"schedule.epochs": "0.2"},
          QUIET)  # fmt: skip
    file = check(str(trained), str(decoded), str(folder), images=16, gallery=24, samples=2, sampling=FEW, console=QUIET,
                 control=str(random), out=tmp_path, device="cpu")  # fmt: skip
    record = json.loads(file.read_text())
    assert set(record["conditions"]) == {OWN, OTHER, "the mean", WRONG, "random encoder's", REAL}
    assert set(record["ahead"]) == {OTHER, "the mean", WRONG, "random encoder's"}
    for metrics in record["conditions"].values():
        for told in metrics.values():
            assert told["interval"][0] <= told["value"] <= told["interval"][1]
    assert record["conditions"][REAL]["mrr"]["value"] > record["conditions"][OTHER]["mrr"]["value"]
    assert record["conditions"][OWN]["pixel_change"]["value"] == 0
    assert record["conditions"][WRONG]["pixel_change"]["value"] > 0
    with pytest.raises(UserError, match="train one with"):
        check(str(trained), str(decoded), str(folder), images=16, gallery=24, samples=2, sampling=FEW, console=QUIET,
              control=str(decoded), out=tmp_path, device="cpu")  # fmt: skip
    with pytest.raises(UserError, match="give a multiple of 8"):
        check(str(trained), str(decoded), str(folder), images=20, gallery=24, samples=2, sampling=FEW, console=QUIET)


def test_a_decoder_that_has_learned_is_true_to_its_images(trained):
    method = fresh(trained, of="block", predict="velocity", width=16, multipliers=(1,), attention=()).train()
    colours = torch.rand(16, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    images = (255 * colours).to(torch.uint8).expand(-1, -1, 24, 40).contiguous()
    recipe = decoding.recipe_for(small(TINY, 2), str(trained), load_run(trained))
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


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("box", "told"),
    [
        ("30,30,20,20", "reaches outside the image of 40x36 pixels"),
        ("-1,2,5,5", "reaches outside"),
        ("4,4,0,5", "is empty"),
        ("4,4,5", "give x,y,width,height"),
        ("a,b,c,d", "give x,y,width,height"),
        ("0,6,40,24", "covers all that the encoder sees"),
        ("0,0,40,30", "is larger than what the encoder sees"),
    ],
)
def test_boxes_that_cannot_be_are_refused(trained, decoded, folder, monkeypatch, capsys, tmp_path, box, told):
    words = ("decode", "complete", str(trained), str(folder / "red" / "00.png"), "--decoder", str(decoded), f"--box={box}",
             "--out", str(tmp_path / "x.png"))  # fmt: skip
    assert told in refused(monkeypatch, capsys, *words)
    assert not (tmp_path / "x.png").exists()


def test_images_that_are_none_are_refused(trained, decoded, loaded, monkeypatch, capsys, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    Image.new("RGB", (3, 2)).save(tmp_path / "small.png")
    for name, told in (
        ("text.png", "not an image"),
        ("small.png", "smaller than a patch"),
        ("none.png", "No such file"),
    ):
        words = ("decode", "sample", str(trained), str(tmp_path / name), "--decoder", str(decoded), "--out", "x.png")
        assert told in refused(monkeypatch, capsys, *words)
    words = (
        "decode",
        "sample",
        str(trained),
        str(tmp_path),
        "--decoder",
        str(decoded),
        "--out",
        "x.png",
        "--samples",
        "0",
    )
    assert "--samples 0: give 1 or more" in refused(monkeypatch, capsys, *words)
    bomb = encoded(Image.new("1", (20000, 20000)), "PNG")
    with pytest.raises(UserError, match="more than the limit"):
        show(loaded, "bomb", bomb, None, 0, 0)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model.depth", "3"], "--model.depth is what the run says"),
        (["--rcdm.fingerprint", "0"], "what the run says"),
        (["--recipe", "ijepa_scenes"], "is of ijepa, which is no decoder"),
        (["--rcdm.size", "9"], "rcdm.size 9 cannot be halved"),
        (["--rcdm.of", "image"], "set rcdm.paint image"),
        (["--rcdm.of", "all"], "one of 'prediction', 'block', 'image'"),
        (["--loss.kind", "l2"], "'loss' is a part of ijepa"),
    ],
)
def test_decoders_that_cannot_be_are_refused(trained, folder, monkeypatch, capsys, tmp_path, words, told):
    words = ["decode", "train", str(trained), "--data", str(folder), "--out", str(tmp_path / "d"), *words]
    assert told in refused(monkeypatch, capsys, *words)
    assert not (tmp_path / "d").exists()


def test_a_decoder_is_trained_for_a_run_alone(folder, monkeypatch, capsys, tmp_path):
    words = ("pretrain", "--recipe", "rcdm_32_cpu", "--data", str(folder), "--out", str(tmp_path / "d"))
    assert "openjepa decode train RUN" in refused(monkeypatch, capsys, *words)


def test_a_method_that_predicts_no_features_has_other_conditions(trained, loaded):
    for name in ("mae", "ibot"):
        recipe = recipe_of(name)
        method = METHODS[name].build(recipe)
        with pytest.raises(UserError, match=re.escape("--rcdm.of block or --rcdm.of image")):
            Condition(method, "prediction")
        images = torch.rand(2, 3, 32, 32)
        masks = Masks(torch.arange(4, 64).expand(2, 1, -1), torch.arange(4).expand(2, 1, -1))
        assert Condition(method, "block")(images, masks).shape == (2, 24)
        assert Condition(method, "image")(images, masks).shape == (2, 24)


def test_an_oracle_completes_nothing(trained, folder, monkeypatch, capsys, tmp_path):
    oracle = tmp_path / "oracle"
    train(str(trained), str(folder), oracle, small(replace(TINY, of="image", paint="image"), 2),
          VALUES | {"schedule.epochs": "0.2"}, QUIET)  # fmt: skip
    picture = str(folder / "red" / "00.png")
    words = ("--decoder", str(oracle), "--steps", "2", "--device", "cpu", "--out", str(tmp_path / "x.png"))
    told = refused(monkeypatch, capsys, "decode", "complete", str(trained), picture, "--box", "8,8,8,8", *words)
    assert "takes a decoder of predictions" in told
    assert command(monkeypatch, capsys, "decode", "sample", str(trained), picture, *words)[0] == 0
    assert (tmp_path / "x.png").exists()


def test_a_missing_library_is_named(trained, folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    words = ("decode", "train", str(trained), "--data", str(folder), "--out", str(tmp_path / "d"))
    assert "pip install 'openjepa[decode]'" in refused(monkeypatch, capsys, *words)
