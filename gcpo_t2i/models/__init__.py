"""Policies: the contract, the decoding engine, and one module per model family.

Importing this package is cheap: transformers and diffusers come in with the family that is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gcpo_t2i.models.folder import read_index
from gcpo_t2i.models.hub import local_folder

if TYPE_CHECKING:
    import torch

    from gcpo_t2i.models.policy import Policy

FAMILIES = {"JanusPolicy": "gcpo_t2i.models.janus", "LlamaGenPolicy": "gcpo_t2i.models.llamagen"}


def policy_class(folder: str | Path) -> type[Policy]:
    """The class of the policy saved in `folder`, its module imported. UserError as `load_policy`, for the model index."""
    from importlib import import_module

    name = read_index(folder, FAMILIES)["_class_name"]
    return getattr(import_module(FAMILIES[name]), name)


def load_policy(
    folder: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Policy:
    """The policy in `folder`, or in a repository of the Hugging Face hub, of whatever family its model_index.json or
    config.json names; dtype None is float32.

    UserError names what is missing, unknown, newer than this version, or of the wrong shape.
    """
    folder = local_folder(folder)
    return policy_class(folder).from_pretrained(folder, device=device, dtype=dtype)
