"""Claims about checkpoints and pickles from strangers: they are loaded, or refused in one line, and nothing else happens."""

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st

import openjepa
from openjepa.convert import released
from openjepa.errors import UserError
from openjepa.recipes.pretrain import build
from openjepa.recipes.recipe import Recipe, from_dict
from tests.fuzz import DAMAGE, EFFORTS, damaged, hold, read_or_refused

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
