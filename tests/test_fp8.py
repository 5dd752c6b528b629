"""`precision: fp8` on a machine without the hardware, where torchao emulates it: its arithmetic, and who is told what."""

from __future__ import annotations

import copy
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from openjepa.engine import checkpoint
from openjepa.engine.device import pick_precision
from openjepa.engine.fp8 import use_fp8
from openjepa.errors import UserError
from openjepa.masking import MaskingConfig, sample
from openjepa.methods.ijepa import IJEPA, LossConfig
from openjepa.models.predictor import PredictorConfig
from openjepa.models.vit import ViTConfig
from openjepa.recipes.pretrain import pretrain
from openjepa.recipes.recipe import override
from tests.helpers import same, weights

QUIET = Console(quiet=True)
CPU = torch.device("cpu")


@pytest.fixture
def method() -> IJEPA:
    torch.manual_seed(0)
    model = ViTConfig(size="Ti", image_size=(32, 32), patch_size=4, width=64, depth=2, heads=2)
    return IJEPA(model, PredictorConfig(width=32, depth=2), LossConfig()).train()


def gradient(method: IJEPA, around: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Tensor:
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    masks = sample(MaskingConfig(), (8, 8), 0, 0, np.arange(8))
    method.zero_grad()
    with around():
        loss = method(images, masks)["loss"]
    loss.backward()
    return torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])


def rounded(x: Tensor) -> Tensor:
    """To e4m3, by the largest value of the tensor."""
    scale = torch.finfo(torch.float8_e4m3fn).max / x.abs().max()
    return (x * scale).to(torch.float8_e4m3fn).float() / scale


def test_a_layer_multiplies_what_is_left_in_eight_bits_and_adds_its_bias_in_full(method):
    plain = copy.deepcopy(method.encoder.blocks[0].mlp.fc1)
    nn.init.normal_(plain.bias)
    method.encoder.blocks[0].mlp.fc1 = copy.deepcopy(plain)
    use_fp8(method, CPU)
    x = torch.randn(5, 64)
    expected = rounded(x) @ rounded(plain.weight).T + plain.bias
    torch.testing.assert_close(method.encoder.blocks[0].mlp.fc1(x), expected, rtol=1e-4, atol=1e-4)


def test_its_gradient_is_that_of_float32_within_eight_bits(method):
    exact = gradient(method)
    use_fp8(method, CPU)
    error = (gradient(method) - exact).norm() / exact.norm()
    assert 1e-3 < error < 0.08  # e4m3 has three bits behind the point, e5m2 two


def test_weights_keep_their_names_and_encoders_predictor_and_blocks_alone_change(method):
    names = [name for name, _ in method.named_parameters()]
    use_fp8(method, CPU)
    assert [name for name, _ in method.named_parameters()] == names
    assert all(p.dtype == torch.float32 for p in method.parameters())
    changed = {name for name, module in method.named_modules() if type(module).__name__ == "Float8Linear"}
    assert {name.split(".")[0] for name in changed} == {"encoder", "target_encoder", "predictor"}
    assert all(".blocks." in name for name in changed)
    called: set[str] = set()
    for name, module in method.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    gradient(method)
    assert changed <= called
    assert len(changed) == 4 * (2 + 2 + 2) - 1  # but the final queries, keys and values, of weights taken apart


def test_sizes_that_do_not_fit_stay_as_they_are(method):
    odd = IJEPA(replace(method.encoder.config, width=24), PredictorConfig(width=32, depth=1), LossConfig())
    assert use_fp8(odd, CPU).startswith("fp8: 3 of 20 linear layers of blocks, emulated")
    kinds = {name: type(module).__name__ for name, module in odd.named_modules() if isinstance(module, nn.Linear)}
    assert {kind for name, kind in kinds.items() if name.startswith("encoder.blocks")} == {"Linear"}
    assert "Float8Linear" in {kind for name, kind in kinds.items() if name.startswith("predictor.blocks")}
    none = IJEPA(replace(method.encoder.config, width=24), PredictorConfig(width=24, depth=1), LossConfig())
    with pytest.raises(UserError, match="no linear layer of a block has sizes that are multiples of 16"):
        use_fp8(none, CPU)


def test_a_run_in_fp8_goes_on_bit_for_bit_and_is_asked_in_bf16(tiny, folder, tmp_path):
    recipe = override(tiny, {"precision": "fp8", "model.width": "32", "machine.checkpoint_every": "1"})
    pretrain(recipe, str(folder), tmp_path / "run", QUIET)
    ended = weights(tmp_path / "run")
    plain = override(recipe, {"precision": "bf16"})
    pretrain(plain, str(folder), tmp_path / "plain", QUIET)
    assert not same(ended, weights(tmp_path / "plain"))
    newest = checkpoint.checkpoints(tmp_path / "run")[-1]
    shutil.rmtree(newest.path)
    assert checkpoint.checkpoints(tmp_path / "run")[-1].step < newest.step
    pretrain(recipe, str(folder), tmp_path / "run", QUIET)
    assert same(ended, weights(tmp_path / "run"))
    assert pick_precision("fp8", CPU) == "bf16"


def test_who_cannot_have_it_is_told_so(method, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "an A100")
    with pytest.raises(UserError, match="an A100 has no fp8 matrix products, take bf16"):
        use_fp8(method, torch.device("cuda", 0))
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UserError, match=r"not installed: pip install 'openjepa\[fp8\]'"):
        use_fp8(method, CPU)
