"""Critical tokens: learn from 30 % of an image's codes (Group Critical-token Policy Optimization, arXiv 2509.22485).

Three tenths, none of which takes what an earlier one has:

    early       the first tenth of the codes, on which all others depend
    edges       the tenth with the steepest map of entropies, among the codes from 10 % to 90 % of raster order. The map
                is smoothed first: each code's entropy becomes the mean of its own and of its neighbours' that are
                before it in raster order (left, upper left, above, upper right)
    diversity   of the rest, the tenth whose places show the most different codes over the group: with the lowest mean
                cosine between the vectors of the codes of all pairs of images

Loss and KL are means over these codes only. Each advantage is multiplied by a running mean over the codes up to its own:

    w_t = mean_{s ≤ t} exp(clip(log π(y_s) − log π_ref(y_s), ±0.5))                  without gradient

Deviations from the published code: there w has a gradient, so that codes that were not selected are trained after all,
through the sums that they have a part in; here it is a weight. And there the vectors are the trunk's inputs for the
codes (of Janus: after the aligner); here they are the image tokenizer's, which training leaves as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gcpo_t2i.algo.groups import group_similarity

SHARE = 0.1  # of the codes, for each of the three
MAX_LOG_RATIO = 0.5


def smoothed(maps: Tensor) -> Tensor:
    """(B,H,W) → (B,H,W): the mean of each value and of its neighbours that are before it in raster order."""
    height, width = maps.shape[1:]

    def total(values: Tensor) -> Tensor:
        padded = F.pad(values, (1, 1, 1, 0))  # nothing to the left, to the right and above
        before = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1))  # upper left, above, upper right, left, itself
        return torch.stack([padded[:, y : y + height, x : x + width] for y, x in before]).sum(dim=0)

    return total(maps) / total(torch.ones_like(maps))


def steepness(entropy: Tensor, grid: tuple[int, int]) -> Tensor:
    """Entropy (B,T) → (B,T): length of the gradient of its smoothed map, by central differences, one-sided at the rims."""
    maps = smoothed(entropy.float().unflatten(1, grid))
    down, right = torch.gradient(maps, dim=(1, 2))
    return torch.hypot(down, right).flatten(1)


def _first(values: Tensor, number: int, allowed: Tensor) -> Tensor:
    """(B,T) → (B,T) bool: in each row the `number` highest of those allowed, the earlier ones first where they tie."""
    order = values.masked_fill(~allowed, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(allowed).scatter_(1, order[:, :number], True) & allowed


def critical_tokens(tensors: Mapping[str, Tensor], mask: Tensor) -> Tensor:
    """`entropy` (B,T) and `code_vectors` (P,G,H,W,D), mask (B,T) bool → (B,T) bool, the codes that are learned from.

    A tenth is rounded down, to one code at least.
    """
    vectors = tensors["code_vectors"]
    places = torch.arange(mask.shape[1], device=mask.device)
    tenth = max(1, int(SHARE * len(places)))
    early = (places < tenth).expand_as(mask)
    middle = ((places >= tenth) & (places < tenth + int((1 - 2 * SHARE) * len(places)))).expand_as(mask)
    edges = _first(steepness(tensors["entropy"], (vectors.shape[2], vectors.shape[3])), tenth, middle)
    alike = group_similarity(vectors).repeat_interleave(vectors.shape[1], dim=0)  # (B,T)
    return (early | edges | _first(-alike, tenth, ~(early | edges))) & mask


def confidence_weight(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Log-probs (B,T) of policy and reference → (B,T) float32 without gradient, 1 where they agree on all before."""
    gap = (logp.detach().float() - ref_logp.detach().float()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return gap.exp().cumsum(dim=1) / torch.arange(1, gap.shape[1] + 1, device=gap.device)


@dataclass(frozen=True)
class Selection:
    """Which codes are learned from. `needs` names the tensors that `fn` reads."""

    name: str
    fn: Callable[[Mapping[str, Tensor], Tensor], Tensor]
    needs: frozenset[str]


CRITICAL = Selection("critical", critical_tokens, frozenset({"entropy", "code_vectors"}))
