"""Chain of thought: the credit of this package on TRL's GRPO. Two changed lines, see docs/cot.md:

    from gcpo_t2i.cot import GuidanceGRPOConfig as GRPOConfig, GuidanceGRPOTrainer as GRPOTrainer

Needs the extra `cot` (trl, datasets). What does not need TRL (questions, answers, negative prompts) imports without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gcpo_t2i.cot.trainer import GuidanceGRPOTrainer
    from gcpo_t2i.cot.trl_config import GuidanceGRPOConfig

__all__ = ["GuidanceGRPOConfig", "GuidanceGRPOTrainer"]

_PLACES = {"GuidanceGRPOTrainer": "gcpo_t2i.cot.trainer", "GuidanceGRPOConfig": "gcpo_t2i.cot.trl_config"}


def __getattr__(name: str) -> Any:
    """TRL takes seconds to import and may not be installed; UserError if it is not, or of another version."""
    if name not in _PLACES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from gcpo_t2i.cot.versions import check_trl

    check_trl()
    return getattr(importlib.import_module(_PLACES[name]), name)
