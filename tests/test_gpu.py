"""What is chosen on a GPU such as an H100, told on a machine without one: tensors without contents, torch's answers replaced."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from openjepa.data.stream import Batch
from openjepa.engine import launch
from openjepa.engine.device import MOST_WORKERS, pick_device, pick_precision, pick_workers
from openjepa.engine.optim import OptimConfig, build_optimizer
from openjepa.errors import UserError
from openjepa.masking import Masks, TokenMasks
from openjepa.models import layers
from openjepa.recipes import pretrain as pretraining
from openjepa.recipes.methods import METHODS
from openjepa.recipes.recipe import Recipe
from tests.conftest import recipe_of
from tests.helpers import command

GPU = torch.device("cuda", 0)
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution"}


@pytest.fixture
def there(monkeypatch) -> None:
    """torch says that there is a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


class Asked(TorchDispatchMode):
    """Counts what is asked of a device: each operator, and the precision of its first tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, torch.dtype]] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = next((leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)), None)
        if first is not None:
            self.seen[op.overloadpacket.__name__, first.dtype] += 1
        return op(*args, **(kwargs or {}))


def forward(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, torch.dtype]]:
    """What a loss in bf16 asks of a GPU; torch's fused attention under the names "sdpa" and "varlen"."""
    asked = Asked()

    def fused(name: str) -> Any:
        def kernel(q: Tensor, *_: Any) -> Tensor:
            asked.seen[name, q.dtype] += 1
            return q

        return kernel

    monkeypatch.setattr(F, "scaled_dot_product_attention", fused("sdpa"))
    monkeypatch.setattr(varlen, "varlen_attn", fused("varlen"))
    views, slots = METHODS[recipe.method].views(recipe), np.arange(4)
    masks = views.masks(0, 0, slots, slots)
    method = METHODS[recipe.method].build(recipe)
    several = (len(views.large),) if len(views.large) > 1 else ()
    with FakeTensorMode(allow_non_fake_inputs=True), asked:
        method = method.to_empty(device=GPU)
        images = torch.empty(4, *several, 3, *views.size, device=GPU)
        small = torch.empty(4, views.smalls, 3, *views.small_size, device=GPU) if views.smalls else None
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.set_autocast_enabled("cuda", True)  # as torch.autocast does where it finds a GPU
        try:
            method(images, masks.to(GPU), small)
        finally:
            torch.set_autocast_enabled("cuda", False)
    return asked.seen


@pytest.mark.parametrize("rank", ["0", "3"])
def test_each_process_takes_its_own_gpu(there, monkeypatch, rank):
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert pick_device("auto") == torch.device("cuda", int(rank))


@pytest.mark.parametrize(("has", "expected"), [(True, "bf16"), (False, "fp32")])
def test_bf16_is_taken_where_the_gpu_has_it_and_not_where_it_is_emulated(monkeypatch, has, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has or including_emulation)
    assert pick_precision("auto", GPU) == expected


@pytest.mark.parametrize(("method", "blocks"), [("ijepa", 5), ("mae", 3), ("ibot", 6)])
def test_every_matrix_product_of_a_step_is_in_bf16_and_attention_is_fused(method, blocks, monkeypatch):
    """So TF32, which is for products of float32 alone, would bring nothing. blocks: gone through, all networks together."""
    seen = forward(recipe_of(method), monkeypatch)
    assert {dtype for name, dtype in seen if name in PRODUCTS} == {torch.bfloat16}
    assert seen["sdpa", torch.bfloat16] == blocks


def test_contexts_of_many_lengths_are_not_padded(monkeypatch):
    seen = forward(recipe_of("ijepa", masking={"context": "packed"}), monkeypatch)
    assert seen["varlen", torch.bfloat16] == 3  # two blocks of the context encoder, one of the predictor
    assert seen["sdpa", torch.bfloat16] == 2  # of the target encoder, which sees whole images


def test_sequences_of_many_lengths_are_handed_over_by_where_they_end(monkeypatch):
    """The flash kernel is replaced by one sequence after another."""

    def one_by_one(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, key_ends: Tensor, longest: int, *_: Any) -> Tensor:
        assert ends.dtype == torch.int32
        assert torch.equal(ends, key_ends)
        assert longest == int(ends.diff().max())
        parts = [slice(a, b) for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]
        own = [layers.plain_attention(*(x[part].transpose(0, 1)[None] for x in (q, k, v))) for part in parts]
        return torch.cat([out[0].transpose(0, 1) for out in own])

    monkeypatch.setattr(varlen, "varlen_attn", one_by_one)
    lengths = torch.tensor([5, 2, 7])
    ragged = layers.Ragged(torch.arange(7) < lengths[:, None], 14)
    q, k, v = torch.randn(3, 14, 2, 8, generator=torch.Generator().manual_seed(0))
    found = layers.flash_attention(q, k, v, ragged)
    torch.testing.assert_close(found, layers.ragged_attention(q, k, v, ragged), rtol=0, atol=1e-5)


def test_the_optimiser_is_one_kernel_a_group():
    with FakeTensorMode(), Asked() as asked:
        layer = nn.Linear(4, 4, device=GPU)
        for p in layer.parameters():
            p.grad = torch.empty_like(p)
        build_optimizer(layer, OptimConfig()).step()
    assert {name: n for (name, _), n in asked.seen.items() if "adamw" in name} == {"_fused_adamw_": 2}


@pytest.mark.parametrize(("device", "pinned"), [(GPU, True), (torch.device("cpu"), False)])
def test_batches_are_pinned_for_a_gpu(tiny, folder, tmp_path, monkeypatch, device, pinned):
    class Begun(Exception):
        pass

    def batches(*_: Any, pin: bool, **__: Any) -> None:
        assert pin is pinned
        raise Begun

    monkeypatch.setattr(pretraining, "pick_device", lambda _: device)
    monkeypatch.setattr(pretraining, "batches", batches)
    monkeypatch.setattr(nn.Module, "to", lambda module, _: module)
    with pytest.raises(Begun):
        pretraining.pretrain(tiny, str(folder), tmp_path / "run")


@pytest.mark.parametrize(
    "masks",
    [Masks(torch.zeros(2, 1, 3), torch.zeros(2, 4, 3), torch.zeros(2, 1), 6), TokenMasks(torch.zeros(2, 2, 3), 0)],
)
def test_no_copy_to_the_gpu_is_waited_for(monkeypatch, masks):
    waits: list[bool] = []
    monkeypatch.setattr(Tensor, "to", lambda t, _, non_blocking=False: (waits.append(not non_blocking), t)[1])
    Batch(torch.zeros(2, 3, 4, 4), masks, torch.zeros(2), []).to(GPU)
    assert waits
    assert not any(waits)


@pytest.mark.parametrize(("ranks", "workers"), [(1, MOST_WORKERS), (4, 7), (32, 0)])
def test_loading_takes_a_gpus_share_of_the_cores_but_one(monkeypatch, ranks, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert pick_workers(None, GPU) == workers
    assert pick_workers(3, GPU) == 3


def test_gpus_meet_by_nccl_each_on_its_own(there, monkeypatch):
    met: dict[str, Any] = {}
    monkeypatch.setattr(launch.parallel, "launched", lambda: (1, 2))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(launch, "rendezvous", lambda _: iter([(None, 1, 2)]))
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: met.update(device=number))

    def meet(backend: str, **_: Any) -> None:
        raise RuntimeError(backend)

    monkeypatch.setattr(launch.dist, "init_process_group", meet)
    with pytest.raises(UserError, match="cpu:gloo,cuda:nccl"), launch.joined():
        pass
    assert met == {"device": 1}


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"},
            {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"},
        ),
    ],
)
def test_memory_grows_in_place_unless_the_user_says_how(monkeypatch, capsys, told, expected):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for name in [name for name in os.environ if name.endswith("ALLOC_CONF")]:
        del os.environ[name]
    os.environ.update(told)
    command(monkeypatch, capsys, "recipes")
    assert {name: value for name, value in os.environ.items() if name.endswith("ALLOC_CONF")} == expected
