"""Claims about what comes from outside, damaged or made to harm: it is read, or refused in one line, and nothing else happens.

Each claim is tried on a fixed list of inputs that hypothesis makes, and with `-m slow` on thousands of new ones.
"""

import io
import os
import tarfile
from pathlib import Path

import pytest
import yaml
from hypothesis import assume
from hypothesis import strategies as st

import openjepa
from openjepa.commands import options
from openjepa.data.sources import open_source
from openjepa.data.stream import DataConfig
from openjepa.data.tar import Damaged, members
from openjepa.errors import UserError
from openjepa.recipes.ijepa import RECIPES
from openjepa.recipes.recipe import Recipe, all_keys, from_dict, override, to_dict, to_yaml
from tests.fuzz import DAMAGE, EFFORTS, damaged, files_below, hold, read_or_refused
from tests.helpers import RED, encoded, make_parquet, steps_of

# ---------------------------------------------------------------- recipes

WORDS = ["S", "paper", "released", "multiblock", "random", "packed", "1e-3", "[1, 2]", "{a: 1}", "&a [*a]", "0x1f", "1:30",
         "2024-99-99", "!!int ''", "!!python/object/apply:os.system [touch touched]", ".nan", "-.inf", "a\nb",
         "\x1b[31m"]  # fmt: skip
NUMBERS = st.integers(-3, 300) | st.sampled_from([10**9, 2**63, -(2**63), 10**400]) | st.floats()
ODD = st.none() | st.booleans() | NUMBERS | st.text(max_size=20) | st.sampled_from(WORDS)
VALUES = st.recursive(
    ODD,
    lambda more: st.lists(more, max_size=4) | st.dictionaries(ODD.filter(lambda k: k is not None), more, max_size=3),
)
KEYS = (
    st.sampled_from(all_keys())
    | st.sampled_from(["model", "optim", "", ".", "model.", "optim.lr.x", "optim.lrr"])
    | st.text(max_size=30)
)
BASES = st.sampled_from(sorted(RECIPES))


@EFFORTS
def test_any_recipe_as_text_is_read_or_refused(effort, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "recipe.yaml"

    def claim(name: str, changes: list[tuple[float, str]], text: str | None) -> None:
        whole = to_yaml(RECIPES[name]()) if text is None else text
        for place, new in changes:
            at = int(place * len(whole))
            whole = whole[:at] + new + whole[at + len(new) // 2 :]
        file.write_bytes(whole.encode(errors="surrogatepass"))
        with read_or_refused():
            recipe, _ = options.read(file)
            assert from_dict(Recipe, yaml.safe_load(to_yaml(recipe))) == recipe
        assert os.listdir() == ["recipe.yaml"]

    places = st.tuples(st.floats(0, 0.999), ODD.map(str) | st.sampled_from(list("&*!|>%@`{}[]:,-?#'\"\t\n")))
    hold(claim, effort, BASES, st.lists(places, max_size=4), st.none() | st.text())


@EFFORTS
def test_any_values_of_a_recipe_are_read_or_refused(effort, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def claim(name: str, changes: list[tuple[str, object]]) -> None:
        values = to_dict(RECIPES[name]())
        for key, value in changes:
            *parents, last = key.split(".")
            part = values
            for parent in parents:
                part = part.get(parent) if isinstance(part, dict) else None
            if isinstance(part, dict):
                part[last] = value
        with read_or_refused():
            recipe = from_dict(Recipe, values)
            assert from_dict(Recipe, yaml.safe_load(to_yaml(recipe))) == recipe

    hold(claim, effort, BASES, st.lists(st.tuples(KEYS, VALUES), max_size=4))


@EFFORTS
def test_any_override_is_read_or_refused(effort, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = RECIPES["ijepa_scenes"]()

    def claim(words: list[str]) -> None:
        with read_or_refused():
            override(recipe, options.pairs(words))
        assert not os.listdir()

    words = st.one_of(KEYS.map("--{}".format), VALUES.map(str), st.builds("--{}={}".format, KEYS, VALUES))
    hold(claim, effort, st.lists(words, max_size=6))


# ---------------------------------------------------------------- images

PIECES = ["scenes", "scenes:", "clevr:", "hf:", "torchvision:", "CIFAR10", "utils", "__name__", "ImageNet", "train", ":",
          "images", ".",
          "x.parquet", "s-{00..01}.tar", "{", "}", "..", ",", "0", "-1", "10000000000000", "*", "?", "[", "]", "~",
          "~no-such-user", "/", "//",
          "://", "file://", "memory://", "http://", "nostore://", "zip://", "simplecache::", "::", "\0", "\n", "\x1b", "\ud800",
          ".tar", ".parquet", "x" * 300, " "]  # fmt: skip
SPECS = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=6).map("".join)


@EFFORTS
def test_any_spec_is_opened_or_refused(effort, place, monkeypatch):
    datasets = pytest.importorskip("datasets")
    (place / "images").mkdir()
    (place / "images" / "a.png").write_bytes(encoded(RED, "PNG"))
    make_parquet(place / "x.parquet", [place / "images" / "a.png"], [0], ["red"])
    write_tar(place / "s-00.tar", [("a.png", encoded(RED, "PNG"))], tarfile.PAX_FORMAT)
    before = files_below(place.parent)

    def no_hub(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", no_hub)

    def claim(spec: str) -> None:
        assume(not above(place, spec))  # a whole disk is a folder like any other, and takes its time
        with read_or_refused():
            source = open_source(spec)
            assert len(source) > 0
            source.name(len(source) - 1)
        assert files_below(place.parent) == before

    hold(claim, effort, SPECS)


def above(place: Path, spec: str) -> bool:
    """Whether a spec may be read as a folder that holds this one."""
    if "*" in spec and (spec.startswith(("/", "~")) or ".." in spec):
        return True
    for path in (spec, spec.rpartition("clevr:")[2]):
        try:
            if place.is_relative_to(folder := Path(path).expanduser().resolve()) and folder != place:
                return True
        except (OSError, ValueError, RuntimeError):
            pass
    return False


def write_tar(file: Path, contents: list[tuple[str, bytes]], form: int) -> bytes:
    with tarfile.open(file, "w", format=form) as archive:
        for name, content in contents:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.read_bytes()


def with_sums(raw: bytes) -> bytes:
    """A tar archive whose headers have the right checksums, so that their damage is not told by them."""
    blocks = [raw[at : at + 512] for at in range(0, len(raw), 512)]
    for i, block in enumerate(blocks):
        if len(block) == 512 and block[257:262] == b"ustar":
            blocks[i] = block[:148] + b"%06o\0 " % (sum(block[:148]) + 256 + sum(block[156:])) + block[156:]
    return b"".join(blocks)


MEMBERS = [("a.png", encoded(RED, "PNG")), ("a.cls", b"1"), ("../b.png", encoded(RED, "PNG")), ("../b.json", b'{"label": 0}'),
           ("long/" * 50 + "c.png", encoded(RED, "PNG")), ("/c.cls", b"7"), ("ünï.png", b"")]  # fmt: skip
FORMS = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


@EFFORTS
def test_any_bytes_are_read_as_a_tar_archive_or_refused(effort):
    def claim(raw: bytes) -> None:
        found = []
        with read_or_refused():
            try:
                for name, offset, size in members(lambda offset, size: raw[offset : offset + size], len(raw)):
                    found.append((name, offset, size))
            except Damaged as error:
                raise UserError(str(error)) from error
        assert all(min(offset, size) >= 0 and offset + size <= len(raw) for _, offset, size in found)

    hold(claim, effort, st.binary(max_size=2000) | st.binary(min_size=512, max_size=2000).map(
        lambda raw: with_sums(raw[:257] + b"ustar" + raw[262:])))  # fmt: skip


@EFFORTS
def test_a_damaged_shard_is_read_or_refused_and_nothing_is_written_beside_it(effort, place):
    good = {form: write_tar(place / "x.tar", MEMBERS[: 4 if form == tarfile.USTAR_FORMAT else 7], form) for form in
            (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)}  # fmt: skip
    before = files_below(place.parent)

    def claim(form: int, damage: object, mended: bool) -> None:
        raw = damaged(good[form], damage)
        (place / "x.tar").write_bytes(with_sums(raw) if mended else raw)
        with read_or_refused():
            show(open_source("x.tar"))
        assert files_below(place.parent) == before

    hold(claim, effort, FORMS, DAMAGE, st.booleans())


def show(source: openjepa.data.sources.Source) -> None:
    """What training does with a source: its names, its labels, a batch."""
    assert all("\n" not in source.name(i) for i in range(len(source)))
    assert all(
        len(labels) == len(source) and labels.max() < len(source.classes[t]) for t, labels in source.labels.items()
    )
    steps_of(source, data=DataConfig(batch_size=min(4, len(source)))).batch(0)


@EFFORTS
def test_a_damaged_index_is_read_or_refused(effort, place):
    write_tar(place / "x.tar", MEMBERS, tarfile.PAX_FORMAT)
    index = open_source("x.tar").index.file
    good = index.read_bytes()

    def claim(damage: object) -> None:
        index.unlink()  # what is mapped stays as it was
        index.write_bytes(damaged(good, damage))
        with read_or_refused():
            show(open_source("x.tar"))

    hold(claim, effort, DAMAGE)


@EFFORTS
def test_a_damaged_parquet_file_is_read_or_refused(effort, place):
    import pyarrow.parquet as pq

    (place / "a.png").write_bytes(encoded(RED, "PNG"))
    make_parquet(place / "x.parquet", [place / "a.png"] * 9, [0, 1, 2] * 3, ["a", "b", "c"])
    table, good = pq.read_table(place / "x.parquet"), {}
    for kind in ("none", "snappy", "gzip", "zstd"):
        pq.write_table(table, place / "x.parquet", compression=kind, row_group_size=4)
        good[kind] = (place / "x.parquet").read_bytes()

    def claim(kind: str, damage: object) -> None:
        (place / "x.parquet").unlink()
        (place / "x.parquet").write_bytes(damaged(good[kind], damage))
        with read_or_refused():
            show(open_source("x.parquet"))

    hold(claim, effort, st.sampled_from(sorted(good)), DAMAGE)


def test_a_recipe_of_a_few_lines_never_stands_for_endless_values(tmp_path):
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    merged = ["a0: &a0 {x: 1}"] + [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 30)]
    for text in ("\n".join(lines), "\n".join(merged), "[" * 10**5, "a: " + "9" * 10**5, "x" * 10**6 + ": 1"):
        (tmp_path / "x.yaml").write_text(text)
        with read_or_refused(), pytest.raises(UserError) as refusal:
            options.read(tmp_path / "x.yaml")
        assert len(str(refusal.value)) < 1000, text[:20]
