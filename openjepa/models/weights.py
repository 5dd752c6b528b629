"""State dicts go into networks whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from openjepa.errors import UserError


def load_strict(module: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Like load_state_dict, with one clear line for what is missing, extra or of another shape. Raises UserError."""
    check_fit(module.state_dict(), weights, where)
    module.load_state_dict(weights)


def check_fit(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], where: str) -> None:
    """The same names with the same shapes. Raises UserError that names what differs."""
    problems = [f"missing {k}" for k in own if k not in weights]
    problems += [f"unexpected {k}" for k in weights if k not in own]
    problems += [
        f"{k} is {list(weights[k].shape)}, expected {list(v.shape)}"
        for k, v in own.items()
        if k in weights and weights[k].shape != v.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{where} does not fit this model: {'; '.join(problems[:3])}{more}")
