"""Low-rank adapters beside the trunk's linear layers (LoRA, arXiv 2106.09685), made, saved and merged by peft.

The trunk stays the module that it was, with peft's layers in place of its own, so the decoding engine and the teacher-forced
pass use them as they are. No dropout: a policy whose log-probs are random cannot be compared with its own rollout.
"""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from gcpo_t2i.config import LoraConfig
from gcpo_t2i.errors import UserError, did_you_mean
from gcpo_t2i.files import whole_folder
from gcpo_t2i.models.policy import Policy, Scores


class Adapters:
    """The adapters of a policy: `handle` is peft's PeftModel around the transformers model that holds the trunk."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    @classmethod
    def add(cls, policy: Policy, config: LoraConfig, base: str, seed: int) -> Adapters:
        """Puts adapters into the policy's trunk, float32 whatever the trunk is; until they are trained they change nothing.

        `base` is the name by which the adapters' config remembers the model. The same seed gives the same adapters on any
        device and in every process. UserError if peft is not installed, or for targets that match nothing.
        """
        peft = import_peft()
        trunk, model = trunk_of(policy), model_with_trunk(policy)
        check_targets(trunk, config.targets)
        inside = next(name for name, module in model.named_modules() if module is trunk)
        start, ends = (re.escape(f"{inside}.") if inside else ""), "|".join(map(re.escape, config.targets))
        settings = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=0.0,
            target_modules=rf"{start}(?:.*\.)?(?:{ends})",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # it asks transformers for an attribute by an old name
            handle = peft.get_peft_model(model, settings)
        handle.peft_config["default"].base_model_name_or_path = base  # peft put the folder of the weights there
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in handle.named_parameters():
            if ".lora_A." in name:  # peft's own start, from a generator instead of the global random numbers
                drawn = nn.init.kaiming_uniform_(torch.empty(parameter.shape), a=math.sqrt(5), generator=generator)
                parameter.data.copy_(drawn)
        return cls(handle)

    def save(self, path: Path) -> None:
        """Writes adapter_config.json and adapter_model.safetensors, as peft does and reads, in place of what is there."""
        with whole_folder(path) as folder:
            self.handle.save_pretrained(folder, save_embedding_layers=False)  # "auto" would ask the hub for new words
            (folder / "README.md").write_text(self._card(), encoding="utf-8")  # peft's own card is a form to fill in

    def merge(self) -> None:
        """Adds the adapters to the weights; the policy is then as if these had been trained, without peft's layers."""
        self.handle.merge_and_unload()

    def _card(self) -> str:
        base = self.handle.peft_config["default"].base_model_name_or_path
        kind = type(self.handle.get_base_model()).__name__
        return (
            f"# LoRA adapters\n\nTrained with gcpo-t2i, for `{base}`. The folder `policy` beside this one holds the model with "
            f"these adapters merged in.\n\n```python\nfrom peft import PeftModel\n\nPeftModel.from_pretrained(base, folder)"
            f"  # base: a {kind} of transformers\n```\n"
        )


class WithoutAdapters:
    """The policy as it was before its adapters were trained: the reference model, without a second copy of the weights."""

    def __init__(self, policy: Policy, adapters: Adapters) -> None:
        self.policy, self.adapters = policy, adapters

    def logp(self, *args: Any, **kwargs: Any) -> Scores:
        """As `Policy.logp`."""
        with self.adapters.handle.disable_adapter():
            return self.policy.logp(*args, **kwargs)


def trainable(policy: Policy) -> list[nn.Parameter]:
    """What is trained, all else frozen: adapters where there are any, else what the family names."""
    adapters = [parameter for name, parameter in policy.named_parameters() if ".lora_" in name]
    if not adapters:
        return policy.set_trainable()
    policy.requires_grad_(False)
    for parameter in adapters:
        parameter.requires_grad_(True)
    return adapters


def import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError(
            'lora.rank needs the package peft; pip install "gcpo-t2i[lora]", or pip install peft'
        ) from error
    return peft


def trunk_of(policy: Any) -> PreTrainedModel:
    if not isinstance(getattr(policy, "trunk", None), PreTrainedModel):
        raise UserError(f"lora.rank: {type(policy).__name__} has no trunk of transformers to put adapters into")
    return policy.trunk


def model_with_trunk(policy: Any) -> PreTrainedModel:
    """The outermost transformers model that the trunk is part of: what peft's files are for."""
    return next(
        module
        for module in policy.modules()
        if isinstance(module, PreTrainedModel) and any(part is policy.trunk for part in module.modules())
    )


def check_targets(trunk: nn.Module, targets: list[str]) -> None:
    """UserError for a target that is the end of no linear layer's name."""
    names = [name for name, module in trunk.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            ends = sorted({name.rpartition(".")[2] for name in names})
            hint = did_you_mean(target, ends)
            known = "" if hint.startswith("; known") else f"; known: {', '.join(ends)}"
            raise UserError(f"lora.targets: '{target}' matches no linear layer of the trunk{hint}{known}")
