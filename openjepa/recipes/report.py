"""Put all that a run's folder holds on one page, RUN/report.html, with pictures of the run's own data."""

from __future__ import annotations

import html
import json
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from openjepa.data.sources import Source
from openjepa.decoder.paint import Sampling
from openjepa.engine import checkpoint
from openjepa.engine.device import pick_device
from openjepa.engine.run import read_metrics
from openjepa.errors import UserError, first_line
from openjepa.evaluate import answers, suite
from openjepa.evaluate.features import View, readable
from openjepa.models.encoder import Encoder
from openjepa.recipes import decoding, faithfulness, samples
from openjepa.recipes.exchange import Trained, load_run, refuse_decoder
from openjepa.recipes.methods import METHODS
from openjepa.recipes.pretrain import FIRST, own_images, random_encoder, saved_data, saved_recipe
from openjepa.recipes.recipe import Recipe, to_yaml
from openjepa.recipes.surprise import judge_of, surprise_of, view_of, without_predictor
from openjepa.rng import permutation
from openjepa.see import figures, pictures
from openjepa.see.report import Section, code, facts, html_table, write_report

SHOWN = 8  # images in a row
SEARCHED = 500  # images that neighbours are looked for in
USUAL = 100  # images that tell what surprise is usual
PAINTED, SAMPLES = 4, 4  # images that a decoder is shown, and samples of each
SAMPLING = Sampling(sampler="ddim", steps=25)
T = TypeVar("T")


def report(run: Path, decoder: Path | None = None) -> Path:
    """Write RUN/report.html from what the run's folder and its data hold. Returns its path.

    decoder: one of this run; unless told, one that lies in the run's folder or beside it. What cannot be drawn says why in its
    place. Raises UserError for what is no run of an encoder, or has seen no images, and for another run's decoder.
    """
    recipe, data = saved_recipe(run), saved_data(run)
    refuse_decoder(recipe, str(run))
    if decoder:
        decoding.load_decoder(str(run), str(decoder))  # raises where it is none of this run
    trained, refusal = attempted(lambda: load_run(run))
    if trained:
        for module in (trained.method, trained.normalise):
            module.to(pick_device("auto"))
    source, gone = attempted(lambda: own_images(run, recipe.model.image_size))
    images = some_images(source, recipe.model.image_size, recipe.model.channels, recipe.seed) if source else None
    metrics, earlier = read_metrics(run), read_metrics(run / FIRST)

    def needing(title: str, make: Callable[[Trained, Source, Tensor], list[Section]]) -> list[Section]:
        """Sections for which weights and images are needed."""
        if trained is None or source is None or images is None:
            return missing(title, refusal or gone)
        return made(title, lambda: make(trained, source, images))

    sections = [what_was_run(run, recipe, data, metrics, earlier, trained)]
    sections += made("What it is worth", lambda: all_worth(run))
    sections += curves(metrics, earlier)
    sections += missing("What it had to predict", gone) if images is None else [masks(recipe, images)]
    sections += needing("What a decoder paints", lambda t, s, i: painted(run, decoder, t, i))
    sections += needing("What surprises it", surprising)
    sections += needing("What patches look alike", lambda t, s, i: [patches(t, i)])
    sections += needing("What images look alike", lambda t, s, i: [alike(t, i)])
    again = shlex.join(["openjepa", "pretrain", "--config", "recipe.yaml", "--data", data["data"], "--out", "again"])
    yaml = f"<pre>{html.escape(again)}</pre>" + code("recipe.yaml", to_yaml(recipe)) + code("data.json", pretty(data))
    sections.append(Section("How to make it again", "", body=yaml))
    steps = metrics[-1]["step"] if metrics else 0
    lead = f"{data['images']} images from {data['data']}, {steps} steps of {recipe.data.batch_size}, seed {recipe.seed}"
    path = run / "report.html"
    write_report(path, f"openjepa: {run.resolve().name}", lead, sections)
    return path


def attempted(make: Callable[[], T]) -> tuple[T | None, str]:
    """What is made, or why it cannot be."""
    try:
        return make(), ""
    except (UserError, OSError) as error:
        return None, first_line(error)


def made(title: str, make: Callable[[], list[Section]]) -> list[Section]:
    """Sections; where they cannot be made, one that says why."""
    sections, refusal = attempted(make)
    return missing(title, refusal) if sections is None else sections


def missing(title: str, why: str) -> list[Section]:
    return [Section(title, f"Not here: {why}", missing=True)]


# ---------------------------------------------------------------- what the folder says


NAMES = {"ijepa": "I-JEPA", "mae": "MAE", "ibot": "iBOT"}


def what_was_run(run: Path, recipe: Recipe, data: dict[str, Any], metrics: Sequence[dict[str, Any]],
                 earlier: Sequence[dict[str, Any]], trained: Trained | None) -> Section:  # fmt: skip
    """Recipe, images, steps, time and machine in a few words. earlier: what the run that came first has logged."""
    model, last = recipe.model, latest(metrics)
    rows = [("method", f"{NAMES.get(recipe.method, recipe.method)}, seed {recipe.seed}, {recipe.precision}")]
    if before := recipe.before():
        theirs = f"a run of {NAMES.get(before.method, before.method)}, {before.schedule.epochs:g} epochs"
        if "elapsed_s" in (end := latest(earlier)):
            theirs += f", {spoken(end['elapsed_s'])}"
        rows.append(("began with", f"the encoder of {run.name}/first, {theirs}"))
    elif recipe.init_from:
        rows.append(("began with", recipe.init_from))
    size = f"{model.dim} wide, {model.n_blocks} deep, {model.n_heads} heads, patches of {model.patch_size}"
    weights = f", {counted(sum(p.numel() for p in trained.method.product.parameters()))} weights" if trained else ""
    rows.append(("encoder", f"ViT, {size}{weights}, images of {model.image_size[0]}x{model.image_size[1]}"))
    rows.append(("images", f"{data['images']:,} from {data['data']}, fingerprint {data['fingerprint']}"))
    if last:
        epochs = f", {last['epoch']:.3g} epochs" if "epoch" in last else ""
        rows.append(("steps", f"{last['step']:,} of {recipe.data.batch_size} images{epochs}"))
    if "elapsed_s" in last:
        rate = f", {last['images_per_s']:,.0f} images a second at the end" if "images_per_s" in last else ""
        rows.append(("time", f"{spoken(last['elapsed_s'])}{rate}"))
    if last.get("skipped_steps"):
        rows.append(("skipped", f"{last['skipped_steps']} steps that were not finite"))
    state, _ = attempted(lambda: checkpoint.locate(run)[1].state())
    if state and state.get("bad_images"):
        rows.append(("unreadable", f"{len(state['bad_images'])} images, named in bad_images.txt"))
    if state and "environment" in state:
        known = state["environment"]
        rows.append(
            ("machine", ", ".join(f"{known[k]}" for k in ("device", "cpu") if known.get(k) not in (None, "cpu")))
        )
        rows.append(("software", ", ".join(f"{k} {known[k]}" for k in ("openjepa", "torch", "python") if k in known)))
    if trained:
        rows.append(("weights", f"step {trained.step:,}, fingerprint {trained.fingerprint()}"))
    return Section("What was run", "", body=facts(rows))


def latest(metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The last of each number: k-NN accuracy is logged by itself."""
    return {name: value for record in metrics for name, value in record.items()}


def spoken(seconds: float) -> str:
    """247 to 4 min 7 s."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def counted(weights: int) -> str:
    """2,700,000 to 2.7 M."""
    return f"{weights / 1e6:.1f} M" if weights >= 1e6 else f"{weights / 1e3:.0f} k"


def curves(metrics: Sequence[dict[str, Any]], earlier: Sequence[dict[str, Any]]) -> list[Section]:
    """earlier: what the run that came first has logged."""
    title = "How training went"
    if not metrics:
        return missing(title, "nothing has been logged (metrics.jsonl)")
    text = (
        "The loss alone says little: features that stop telling images apart also make it fall. "
        "Spread and rank must stay away from zero, the cosine between images away from one."
    )
    if earlier:
        text += " Grey, up to step 0: the run that came first."
    first, last = latest(metrics[::-1]), latest(metrics)
    moved = ", ".join(f"{k.replace('_', ' ')} {first[k]:.3g} to {last[k]:.3g}"
                      for k in figures.PANELS if k in first and k in last)  # fmt: skip
    alt = f"Curves over steps {first['step']} to {last['step']}: {moved}"
    return [Section(title, text, figures.curves_figure(metrics, earlier), alt=alt)]


def all_worth(run: Path) -> list[Section]:
    known = answers.read(run)
    if not known:
        raise UserError(f"it has not been evaluated (openjepa evaluate {run} --train SPEC --test SPEC)")
    return [section for records in together(known) for section in worth(records)]


def together(known: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The newest answers, a list for each pair of sets, network and view."""
    newest = {pretty([r.get("changed"), *(r[name] for name in answers.PLACE)]): r for r in known}
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in newest.values():
        groups.setdefault(pretty([record[name] for name in ("train", "test", "network", "view")]), []).append(record)
    return list(groups.values())


def worth(records: list[dict[str, Any]]) -> list[Section]:
    """The scores on one test set, and who is taken for whom."""
    one = records[0]
    height, width = one["view"]["size"]
    text = (
        f"The pretrained {one['network'].replace('_', ' ')}, the same network with random weights, and raw pixels, on "
        f"{one['test']}, seen at {height}x{width} pixels. The bars' ends and the ± are 95 % intervals over the test images, sd "
        "is the deviation over draws."
    )
    subjects, rows = suite.rows(records)
    table = html_table(["task", "protocol", "metric"], subjects, rows)
    alt = "Bars of the scores in the table below, with their intervals"
    sections = [Section("What it is worth", text, figures.scores_figure(records), table, alt)]
    shown = [r for r in records if r["of"] == "pretrained" and "confusion" in r["details"]]
    if shown:
        protocol = "linear" if any(r["protocol"] == "linear" for r in shown) else shown[0]["protocol"]
        chosen = [r for r in shown if r["protocol"] == protocol]
        tasks = ", ".join(r["task"] for r in chosen)
        text = f"Each class by its own score, {protocol}."
        alt = f"Bars of the share of each class that is told rightly: {tasks}"
        sections.append(Section("Which classes it knows", text, figures.classes_figure(chosen), alt=alt))
        text = f"Of the images of each class, the share in percent that {protocol} takes for each other."
        alt = f"Confusion matrices, true classes in rows: {tasks}"
        sections.append(Section("What it confuses", text, figures.confusion_figure(chosen), alt=alt))
    return sections


# ---------------------------------------------------------------- what its networks make of images


def masks(recipe: Recipe, images: Tensor) -> Section:
    family, some = METHODS[recipe.method], images[:SHOWN]
    drawn = family.views(recipe).masks(recipe.seed, 0, np.arange(len(some)), np.arange(len(some)))
    figure = pictures.masks_figure(some, drawn, recipe.model.grid)
    alt = f"{len(some)} images, what is seen of each, and what is to be predicted"
    return Section("What it had to predict", family.kind.task, figure, alt=alt)


def encoder_of(trained: Trained) -> Encoder:
    """The encoder that training was for, where the run's networks are."""
    return Encoder(trained.method.product, trained.normalise, trained.method.product_name())


def patches(trained: Trained, images: Tensor) -> Section:
    device = next(trained.method.parameters()).device
    subjects = [("pretrained", encoder_of(trained).to(device)), ("random weights", random_encoder(trained.recipe))]
    text = "The three principal directions of the patch features as red, green and blue, the same for all images."
    alt = "Images, and below them their patches coloured by the pretrained and by the random encoder"
    return Section("What patches look alike", text, pictures.pca_figure(subjects, images[:SHOWN]), alt=alt)


def alike(trained: Trained, images: Tensor) -> Section:
    text = f"Nearest neighbours by cosine of pooled features, among {len(images)} images."
    figure = pictures.neighbours_figure(encoder_of(trained), images)
    return Section("What images look alike", text, figure, alt="Rows: an image, framed, and the images nearest to it")


def surprising(trained: Trained, source: Source, images: Tensor) -> list[Section]:
    """The energy of each patch beside what is usual. Raises UserError for a run without a predictor of features."""
    if refusal := without_predictor(trained):
        raise UserError(refusal)
    surprise = surprise_of(trained)
    if (stride := max(1, min(surprise.block) // 2)) > 1:
        surprise = surprise_of(trained, stride=stride)
    judge = judge_of(surprise, trained, source, view_of(trained, source), USUAL)
    energies, unusual, scores = judge(images[:SHOWN])
    text = (
        "How far the predictor is from the target encoder's features of a patch, hidden with its block and told from the rest; "
        f"below, how unusual that is beside {judge.usual.images} of the run's images. Above, the most unusual patch, and the share "
        f"of {len(judge.usual.scores)} of them that stay under it."
    )
    alt = f"Images, most unusual patches of {', '.join(f'{s:.1f}' for s in scores)}, and maps of the surprise of all patches"
    figure = pictures.surprise_figure(images[:SHOWN], energies, unusual, judge.usual.scores)
    return [Section("What surprises it", text, figure, alt=alt)]


def painted(run: Path, given: Path | None, trained: Trained, images: Tensor) -> list[Section]:
    """The paper's figure by a decoder of this run, and whether it is true. Raises UserError for one of another run, or none."""
    folder = given or beside(run, trained)
    if folder is None:
        raise UserError(
            f"no decoder of this run lies in it or beside it (openjepa decode train {run} --data SPEC --out DECODER; --decoder "
            "DECODER names one elsewhere)"
        )
    loaded = decoding.load_decoder(str(run), str(folder))
    raws = [(f"image {i}", image.permute(1, 2, 0).numpy()) for i, image in enumerate(images[:PAINTED])]
    drawn = samples.figure_of(loaded, raws, SAMPLES, SAMPLING)[0]
    what = loaded.recipe.rcdm
    text = (
        f"{folder.resolve().name}, at its step {loaded.step:,}, paints the {what.paint} from the {what.of} alone; samples differ "
        "by their noise. What they share is in the representation."
    )
    alt = f"Rows: an image, the same with a block hidden, and {SAMPLES} samples of what may be there"
    return [Section("What a decoder paints", text, drawn, faithful(folder), alt)]


def beside(run: Path, trained: Trained) -> Path | None:
    """A decoder of these very weights in a run's folder or in the one around it; one of predictions first."""
    own = trained.fingerprint()
    found = []
    for file in sorted([*run.glob("*/recipe.yaml"), *run.resolve().parent.glob("*/recipe.yaml")]):
        recipe, _ = attempted(partial(saved_recipe, file.parent))
        if (
            recipe
            and recipe.method == "rcdm"
            and recipe.rcdm.fingerprint == own
            and checkpoint.checkpoints(file.parent)
        ):
            found.append((recipe.rcdm.networks != "trained", recipe.rcdm.of != "prediction", file.parent))
    return min(found)[-1] if found else None


def faithful(decoder: Path) -> str:
    """The table of `decode check`, where it was asked."""
    try:
        known = json.loads((decoder / faithfulness.FAITHFULNESS).read_text())
        metrics = [m for m in known["metrics"] if m in faithfulness.TABLED]
        rows = [
            [name, *(said(values.get(metric)) for metric in metrics)] for name, values in known["conditions"].items()
        ]
        rows.append(["chance", *(f"{known['chance'][m]:.3f}" if m in known["chance"] else "" for m in metrics)])
        words = (
            "Each sample is encoded anew. mrr and first: how high its own image ranks by distance among "
            f"{known['gallery']}, 1 at most; more is truer. distance and pixel rmse: how far it is from what it was told, and from "
            "the image; less is truer. spread: how much samples of one condition differ, as a share of what images do."
        )
        return f"<p>{words}</p>" + html_table(["painted from"], [m.replace("_", " ") for m in metrics], rows)
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{decoder / faithfulness.FAITHFULNESS} cannot be read ({first_line(error)}): move it away"
        ) from error


def said(answer: dict[str, Any] | None) -> str:
    if not answer or not answer["interval"]:
        return ""
    return faithfulness.told(answer["value"], answer["interval"])


def some_images(source: Source, size: tuple[int, int], channels: int, seed: int) -> Tensor:
    """A fixed random choice of images, uint8 [n, C, H, W]."""
    chosen = permutation(seed, "report", 0, len(source))[:SEARCHED]
    return readable(source, chosen, View(size, channels, squash=source.whole))[0]


def pretty(value: Any) -> str:
    return json.dumps(value, indent=1)
