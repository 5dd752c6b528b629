import json
import math

import pytest
import torch

from openjepa.engine.optim import OptimConfig, Schedule, ScheduleConfig, build_optimizer, set_rates
from openjepa.engine.train import gradient_norm
from openjepa.errors import UserError
from openjepa.methods.ijepa import IJEPA, LossConfig
from openjepa.models.predictor import PredictorConfig
from openjepa.models.vit import ViTConfig


def test_schedules_equal_the_released_ones(golden):
    g = json.loads((golden / "schedules.json").read_text())
    optim = OptimConfig(lr=g["ref_lr"], start_lr=g["start_lr"], final_lr=g["final_lr"], weight_decay=g["wd"],
                        final_weight_decay=g["final_wd"])  # fmt: skip
    plan = ScheduleConfig(epochs=g["epochs"], warmup_epochs=g["warmup_epochs"], ema=tuple(g["ema"]))
    schedule = Schedule(optim, plan, g["ipe"])
    for i, step in enumerate(g["step"]):
        assert schedule.lr(step) == pytest.approx(g["lr"][i], rel=1e-9)
        assert schedule.weight_decay(step) == pytest.approx(g["weight_decay"][i], rel=1e-9)
        assert schedule.momentum(step) == pytest.approx(g["momentum"][i], rel=1e-12)


def test_schedules_of_the_tiny_golden_run(golden):
    g = json.loads((golden / "ijepa_tiny.json").read_text())
    schedule = Schedule(OptimConfig(), ScheduleConfig(epochs=g["epochs"], warmup_epochs=1), g["ipe"])
    for step in range(10):
        assert schedule.lr(step) == pytest.approx(g["lr"][step], rel=1e-9)
        assert schedule.weight_decay(step) == pytest.approx(g["weight_decay"][step], rel=1e-9)
        assert schedule.momentum(step) == pytest.approx(g["momentum"][step], rel=1e-12)


def test_a_cosine_moves_the_average_slowly_at_both_ends():
    plan = ScheduleConfig(epochs=4, warmup_epochs=1, ema=(0.9, 1.0), ema_shape="cosine")
    found = [Schedule(OptimConfig(), plan, 2).momentum(step) for step in (0, 2, 4, 6, 8)]
    assert found == pytest.approx([1 - 0.05 * (1 + math.cos(math.pi * share)) for share in (0, 0.25, 0.5, 0.75, 1)])


def test_each_parameters_gradient_is_clipped_by_its_own_length():
    large, small = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    large.grad, small.grad = torch.tensor([30.0, 40.0]), torch.tensor([0.3, 0.4])
    norm = gradient_norm([large, small], OptimConfig(clip_each=3.0))
    assert norm.item() == pytest.approx(math.hypot(50, 0.5))
    assert large.grad.tolist() == pytest.approx([1.8, 2.4])
    assert small.grad.tolist() == pytest.approx([0.3, 0.4])


def test_horizon_stretches_the_rates_beyond_the_end():
    short, long = (
        Schedule(OptimConfig(), ScheduleConfig(epochs=10, warmup_epochs=1, horizon=h), 100) for h in (1, 1.25)
    )
    assert short.lr(999) == pytest.approx(1e-6)
    assert long.lr(999) > 1e-4
    assert long.momentum(999) < short.momentum(999)


def test_biases_and_vectors_are_not_decayed_and_the_mask_token_is():
    config = ViTConfig(size="Ti", image_size=(32, 32), patch_size=4, width=24, depth=1, heads=2)
    method = IJEPA(config, PredictorConfig(width=16, depth=1), LossConfig())
    optimizer = build_optimizer(method, OptimConfig())
    decayed, free = (group["params"] for group in optimizer.param_groups)
    assert all(p.ndim > 1 for p in decayed)
    assert all(p.ndim == 1 for p in free)
    assert any(p is method.predictor.mask_token for p in decayed)
    assert len(decayed) + len(free) == sum(p.requires_grad for p in method.parameters())
    set_rates(optimizer, 0.5, 0.25)
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.5]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.25, 0.0]


@pytest.mark.parametrize(
    "settings", [{"lr": 0.0}, {"lr": -1e-3}, {"accumulate": 0}, {"clip_norm": 0.0}, {"betas": (0.9, 1.0)}]
)
def test_impossible_rates_are_refused(settings):
    with pytest.raises(UserError, match="optim"):
        OptimConfig(**settings)


def test_a_warmup_as_long_as_the_run_is_refused():
    with pytest.raises(UserError, match=r"warmup_epochs \(300\) must be shorter than the run \(300 epochs\)"):
        ScheduleConfig(warmup_epochs=300)


def test_gradients_are_clipped_to_the_norm_asked_for():
    from openjepa.engine.train import gradient_norm

    p = torch.nn.Parameter(torch.zeros(4))
    p.grad = torch.full((4,), 3.0)
    assert gradient_norm([p], OptimConfig()).item() == pytest.approx(6.0)
    assert p.grad.norm().item() == pytest.approx(6.0)
    assert gradient_norm([p], OptimConfig(clip_norm=1.5)).item() == pytest.approx(6.0)
    assert p.grad.norm().item() == pytest.approx(1.5, rel=1e-4)
