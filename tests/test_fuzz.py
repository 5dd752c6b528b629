"""Claims about what comes from outside, damaged or made to harm: it is read, or refused in one line, and nothing else happens.

Each claim is tried on a fixed list of inputs that hypothesis makes, and with `-m slow` on thousands of new ones.
"""

import io
import os
import pickle
import signal
import socket
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

import openjepa
from openjepa.commands import options
from openjepa.convert import released
from openjepa.data import store
from openjepa.data.sources import open_source
from openjepa.data.stream import DataConfig
from openjepa.data.tar import Damaged, members
from openjepa.errors import UserError
from openjepa.recipes.ijepa import RECIPES
from openjepa.recipes.pretrain import build
from openjepa.recipes.recipe import Recipe, all_keys, from_dict, override, to_dict, to_yaml
from tests.helpers import RED, encoded, make_parquet
from tests.test_sources import steps_of

HANGS_S = 60  # far above what any input takes

LAX = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))
QUICK = settings(LAX, derandomize=True, max_examples=200, phases=[Phase.explicit, Phase.generate])
LONG = settings(LAX, max_examples=4000)
EFFORTS = pytest.mark.parametrize(
    "effort", [pytest.param(QUICK, id="quick"), pytest.param(LONG, id="long", marks=pytest.mark.slow)]
)


def hold(claim: Callable[..., None], effort: settings, *inputs: st.SearchStrategy) -> None:
    effort(given(*inputs)(claim))()


@contextmanager
def read_or_refused() -> Iterator[None]:
    """What happens inside ends, and ends well or in a UserError of one line."""

    def stop(number: int, frame: object) -> None:
        raise AssertionError(f"it hangs: {HANGS_S} s")

    refusal = None
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANGS_S)
    try:
        yield
    except UserError as error:
        refusal = str(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert refusal is None or refusal.isprintable(), f"not one line: {refusal!r}"
    assert refusal is None or 0 < len(refusal) < 5000, "a line that nobody reads"


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder to be in, with the cache elsewhere and the network down."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setenv("OPENJEPA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "WAITS_S", (0.0,))

    def down(*_: object) -> None:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket, "getaddrinfo", down)
    monkeypatch.setattr(socket.socket, "connect", down)
    return here


def files_below(folder: Path) -> set[str]:
    """All but what lies in the cache."""
    return {str(file) for file in folder.rglob("*") if "cache" not in file.parts}


DAMAGE = st.tuples(
    st.lists(st.tuples(st.floats(0, 0.9999), st.binary(min_size=1, max_size=9), st.booleans()), max_size=6),
    st.none() | st.floats(0, 1),
)


def damaged(raw: bytes, damage: tuple[list[tuple[float, bytes, bool]], float | None]) -> bytes:
    """Bytes overwritten, or put between others, at places that are shares of the whole; then what is behind one cut off."""
    changes, end = damage
    for share, new, between in changes:
        at = int(share * len(raw))
        raw = raw[:at] + new + raw[at + (0 if between else len(new)) :]
    return raw if end is None else raw[: int(end * len(raw))]


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


# ---------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A released checkpoint of the smallest networks, with its optimiser."""
    model = {"size": "Ti", "image_size": 16, "patch_size": 4, "width": 8, "depth": 1, "heads": 2}
    recipe = from_dict(
        Recipe,
        {"model": model, "predictor": {"width": 8, "depth": 1}, "masking": {"strategy": "random", "min_keep": 1}},
    )
    method = build(recipe)
    weights = {name: getattr(method, name).state_dict() for name in released.NETWORKS}
    moments = {
        f"{name}/{kind}": torch.zeros_like(p) for name, p in method.named_parameters() for kind in released.MOMENTS
    }
    steps = {f"{name}/step": torch.tensor(3.0) for name, _ in method.named_parameters()}
    about = {
        "weight_decay": 0.1,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "lr": 1e-3,
        "epoch": 1,
        "loss": 1.0,
        "batch_size": 8,
        "world_size": 1,
    }
    file = tmp_path_factory.mktemp("checkpoint") / "x.pth.tar"
    released.write(file, recipe.model, recipe.predictor, weights, moments | steps, about)
    assert openjepa.load(file, heads=2).vit.config.depth == 1
    return file


@EFFORTS
def test_a_damaged_checkpoint_is_loaded_or_refused(effort, place, checkpoint):
    old = io.BytesIO()
    torch.save(torch.load(checkpoint), old, _use_new_zipfile_serialization=False)
    good = {"zip": checkpoint.read_bytes(), "pickle": old.getvalue()}

    def claim(kind: str, damage: object) -> None:
        Path("x.pth").write_bytes(damaged(good[kind], damage))
        with read_or_refused():
            openjepa.load("x.pth", heads=2)
        assert os.listdir() == ["x.pth"]

    hold(claim, effort, st.sampled_from(["zip", "pickle"]), DAMAGE)


STRANGE: dict[str, Callable[[], object]] = {
    "scalar": lambda: torch.tensor(1.0),
    "empty": lambda: torch.zeros(0, 8),
    "repeated": lambda: torch.zeros(1).expand(2**20, 2**20),
    "sparse": lambda: torch.eye(8).to_sparse(),
    "complex": lambda: torch.zeros(8, dtype=torch.complex64),
    "bool": lambda: torch.ones(8) > 0,
    "nan": lambda: torch.full((8,), torch.nan),
    "half": lambda: torch.zeros(8).half(),
    "meta": lambda: torch.zeros(8, 8, device="meta"),
    "flat": lambda: torch.zeros(8, 3, 0, 0),
    "quantised": lambda: torch.quantize_per_tensor(torch.zeros(8), 0.1, 0, torch.qint8),
    "six": lambda: torch.zeros(1, 1, 1, 1, 1, 1),
    "number": lambda: 7,
    "huge": lambda: 2**70,
    "minus": lambda: -1,
    "text": lambda: "a\nb",
    "none": lambda: None,
    "list": lambda: [[1], {}],
    "dict": dict,
    "itself": lambda: itself(),
}
NAMES = ["module.blocks.0.attn.qkv.weight", "module.blocks.999999999999.norm1.weight", "module.blocks.7.x",
         "module.pos_embed", "module.",
         "module.patch_embed.proj.weight", "module.predictor_embed.weight", "module.predictor_pos_embed",
         "module.cls_token", "a\nb",
         "state", "param_groups", "exp_avg", "step", "params", 0, -1, None]  # fmt: skip


def itself() -> list:
    found: list = []
    found.append(found)
    return found


@EFFORTS
def test_a_checkpoint_of_anything_is_loaded_or_refused(effort, place, checkpoint):
    """Names and values of the right and the wrong kind in the right and the wrong places."""

    def claim(changes: list[tuple[list[float], object, str]]) -> None:
        saved = torch.load(checkpoint)
        for way, name, value in changes:
            part = saved
            for share in way:
                inner = list(part.values()) if isinstance(part, dict) else part
                if isinstance(inner, list) and inner and isinstance(inner[int(share * len(inner))], dict | list):
                    part = inner[int(share * len(inner))]
            keys = list(part) if isinstance(part, dict) else list(range(len(part)))
            key = keys[int(name * len(keys))] if isinstance(name, float) and keys else name
            if isinstance(part, dict) or (isinstance(key, int) and -len(part) <= key < len(part)):
                part[key] = STRANGE[value]()
        torch.save(saved, "x.pth")
        with read_or_refused():
            openjepa.load("x.pth", heads=2)

    ways = st.lists(st.floats(0, 0.9999), max_size=3)
    names = st.floats(0, 0.9999) | st.sampled_from(NAMES)
    hold(claim, effort, st.lists(st.tuples(ways, names, st.sampled_from(sorted(STRANGE))), min_size=1, max_size=3))


@pytest.mark.parametrize(
    ("network", "name", "value"),
    [
        ("target_encoder", "module.blocks.999999999999.norm1.weight", torch.ones(8)),
        ("predictor", "module.predictor_blocks.999999999999.norm1.weight", torch.ones(8)),
        ("target_encoder", "module.norm.weight", torch.ones(1).expand(2**20, 2**20)),
        ("encoder", "module.pos_embed", torch.ones(1).expand(1, 2**20, 2**20)),
    ],
)
def test_a_few_bytes_never_stand_for_endless_networks(place, checkpoint, network, name, value):
    saved = torch.load(checkpoint)
    saved[network][name] = value
    torch.save(saved, "x.pth")
    assert os.path.getsize("x.pth") < 2**20
    with read_or_refused(), pytest.raises(UserError, match=r"x\.pth"):
        openjepa.load("x.pth", heads=2)


def test_a_recipe_of_a_few_lines_never_stands_for_endless_values(tmp_path):
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    merged = ["a0: &a0 {x: 1}"] + [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 30)]
    for text in ("\n".join(lines), "\n".join(merged), "[" * 10**5, "a: " + "9" * 10**5, "x" * 10**6 + ": 1"):
        (tmp_path / "x.yaml").write_text(text)
        with read_or_refused(), pytest.raises(UserError) as refusal:
            options.read(tmp_path / "x.yaml")
        assert len(str(refusal.value)) < 1000, text[:20]


CALLS = ["os\nsystem", "posix\nsystem", "subprocess\nPopen", "builtins\nexec", "builtins\neval", "builtins\ngetattr",
         "pathlib\nPath.touch",
         "torch\nload", "torch.serialization\nload", "torch._utils\n_rebuild_tensor_v2", "collections\nOrderedDict",
         "torch\nFloatStorage",
         "torch.hub\nload", "torch._dynamo\noptimize", "numpy\nload", "runpy\n_run_code", "a\nb"]  # fmt: skip
COMMAND = "touch touched"
ARGUMENTS = [f"(V{COMMAND}\ntR", "(ctorch\nFloatStorage\ntR", f"(Vos\nVsystem\ntR(V{COMMAND}\ntR",
             f"(V__import__('os').system('{COMMAND}')\ntR",
             "(Vtouched\ntR", "(]V/bin/touch\naVtouched\natR", ")R", "}b", "(K\x01K\x02tR", "\x81", "0", "2", "q\x00",
             "h\x00", "h\x07", "Q"]  # fmt: skip
PROGRAMS = st.lists(
    st.sampled_from([f"c{call}\n" for call in CALLS]) | st.sampled_from(ARGUMENTS) | st.text(max_size=3), max_size=8
)


def packed(program: bytes, form: str) -> bytes:
    """A pickle as torch.save wrote or writes it."""
    if form == "zip":
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr("archive/data.pkl", program)
            archive.writestr("archive/version", b"3\n")
            archive.writestr("archive/byteorder", b"little")
        return out.getvalue()
    if form == "old":
        begin = (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {"little_endian": True})
        return b"".join(pickle.dumps(value, 2) for value in begin) + program
    return program


FORMATS = ("zip", "old", "bare")


@EFFORTS
def test_no_pickle_runs_anything(effort, place):
    def claim(program: list[str], form: str) -> None:
        raw = b"\x80\x02" + "".join(program).encode("utf-8", "surrogatepass") + b"."
        Path("x.pth").write_bytes(packed(raw, form))
        with read_or_refused():
            openjepa.load("x.pth", heads=2)
        assert os.listdir() == ["x.pth"]

    hold(claim, effort, PROGRAMS, st.sampled_from(FORMATS))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("call", "given_to_it"),
    [
        (os.system, (COMMAND,)),
        (Path.touch, (Path("touched"),)),
        (exec, ("open('touched', 'w')",)),
        (eval, ("open('touched', 'w')",)),
    ],
)
def test_what_would_run_elsewhere_is_refused_by_its_name(place, form, call, given_to_it):
    class Malicious:
        def __reduce__(self):
            return call, given_to_it

    program = pickle.dumps({"target_encoder": Malicious()}, 2)
    pickle.loads(program)
    assert os.path.exists("touched")  # it is as malicious as it says
    os.remove("touched")
    Path("x.pth").write_bytes(packed(program, form))
    with pytest.raises(UserError, match="is refused: it asks for"):
        openjepa.load("x.pth", heads=2)
    assert os.listdir() == ["x.pth"]
