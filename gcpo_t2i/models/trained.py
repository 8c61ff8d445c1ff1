"""Which parameters a run trains, and how fast each module of them learns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gcpo_t2i.errors import UserError, did_you_mean
from gcpo_t2i.models.lora import trainable
from gcpo_t2i.models.policy import Policy


def in_module(parameter: str, module: str) -> bool:
    """Whether a parameter belongs to a module, both by name: `v_proj` to every layer's, `layers.0.mlp` to that one's."""
    return f".{module}." in f".{parameter}."


def rate_of(parameter: str, modules: Mapping[str, float]) -> float | None:
    """The factor on the learning rate of the module that the parameter is in, of the longest name if it is in several."""
    found = [module for module in modules if in_module(parameter, module)]
    return modules[max(found, key=len)] if found else None


def trained(policy: Policy, modules: Mapping[str, float] | None) -> dict[float, list[nn.Parameter]]:
    """What is trained, all else frozen, by the factor on its learning rate: of what `trainable` gives, the parameters in
    `modules`; all, with the factor 1, without that, and of adapters, which are their own choice.

    UserError where no module has such a name.
    """
    every = trainable(policy)
    offered = {id(parameter) for parameter in every}
    named = [(name, parameter) for name, parameter in policy.named_parameters() if id(parameter) in offered]
    if modules is None or not named or any(".lora_" in name for name, _ in named):
        return {1.0: every}
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in named:
        rate = rate_of(name, modules)
        if rate is None:
            parameter.requires_grad_(False)
        else:
            groups.setdefault(rate, []).append(parameter)
    if not groups:
        there = sorted({part for name, _ in named for part in name.split(".")[:-1] if not part.isdigit()})
        raise UserError(
            f"optim.modules names {', '.join(modules)}, and the model trains no module of these names"
            f"{did_you_mean(next(iter(modules)), there)}; it has {', '.join(there)}; null trains them all"
        )
    return groups


def missing(policy: Policy, modules: Mapping[str, float] | None) -> list[str]:
    """A note on names in `modules` that nothing in the policy has."""
    names = [name for name, _ in policy.named_parameters()]
    absent = [module for module in modules or () if not any(in_module(name, module) for name in names)]
    return [f"optim.modules: nothing in the model is called {', '.join(absent)}"] if absent else []


def flat(groups: Mapping[float, list[nn.Parameter]]) -> list[nn.Parameter]:
    return [parameter for parameters in groups.values() for parameter in parameters]


def optimizer_groups(groups: Mapping[float, list[nn.Parameter]]) -> list[dict[str, Any]]:
    """Parameter groups of a torch optimizer, each with its `factor`."""
    return [{"params": parameters, "factor": factor} for factor, parameters in groups.items()]


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("factor", 1.0)
