"""The algorithms: pure functions on tensors, and the rows that name them. Imports torch and the standard library only.

    edits       what is done to samples or rewards before: references for groups that failed, the entropy reward
    advantage   rewards (P,G) → advantage (P,G)
    critical    which codes are learned from, and a weight by how far the policy has moved on them
    credit      rollout log-probs (B,T) → how the advantage of a sample is shared out over its tokens (B,T)
    groups      how alike the images of a group are, code by code
    loss        log-probs, advantage, weights → one scalar, and metrics
    rows        which of these an algorithm uses, one frozen record each

P prompts, G samples of each, B = P·G, T image tokens, V codes. All is computed in float32, whatever comes in.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def unknown(kind: str, value: str, known: Iterable[str]) -> ValueError:
    """The error for a name that is in no table: it says what was meant, what was given and what is near or known."""
    names = sorted(known)
    near = get_close_matches(value, names, n=1, cutoff=0.5)
    hint = f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(names)}"
    return ValueError(f"unknown {kind} '{value}'{hint}")
