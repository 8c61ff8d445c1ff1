"""What every autoregressive image policy offers to training, and the records that pass between the two."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from gcpo_t2i.models.captions import Reading


@dataclass(frozen=True)
class Condition:
    """Encoded captions. Rows are captions, padded LEFT to L: the model's fixed caption length, or that of the longest."""

    states: Tensor  # (N, L, D) text-encoder states, zero where padded; or (N, L) token ids, where the trunk embeds them
    mask: Tensor  # (N, L) bool, True on caption tokens; the last column is always True

    def __len__(self) -> int:
        return self.states.shape[0]

    def __getitem__(self, index: Any) -> Condition:
        """Rows by slice, list, or index tensor. A single int would drop the row dimension: pass [i]."""
        return Condition(self.states[index], self.mask[index])

    def repeat_interleave(self, n: int) -> Condition:
        """Each row n times in a row: (P, …) → (P*n, …), groups contiguous."""
        return Condition(self.states.repeat_interleave(n, 0), self.mask.repeat_interleave(n, 0))

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        """Rows of several conditions of one model, one after another, padded to the longest."""
        longest = max(part.mask.shape[1] for part in parts)
        padded = [part.padded(longest) for part in parts]
        return Condition(torch.cat([part.states for part in padded]), torch.cat([part.mask for part in padded]))

    def padded(self, length: int) -> Condition:
        """With columns on the left that are attended by nothing, up to `length` in all."""
        extra = length - self.mask.shape[1]
        mask = F.pad(self.mask, (extra, 0))
        return Condition(F.pad(self.states, (0, 0) * (self.states.ndim - 2) + (extra, 0)), mask)

    def to(self, device: torch.device | str) -> Condition:
        return Condition(self.states.to(device), self.mask.to(device))

    def trimmed(self) -> Condition:
        """Without the columns on the left that no row uses: (N, K, D), K ≥ 1 the longest caption.

        Exact for every model whose padding is masked: what is cut was attended by nothing.
        """
        longest = max(1, int(self.mask.sum(1).max()))
        return Condition(self.states[:, -longest:], self.mask[:, -longest:])


@dataclass(frozen=True)
class Rollout:
    """Sampled codes of B = P*G images, groups contiguous, and what the sampler knew about each code. No gradients.

    `sample_logp` is under the guided mixture at the sampling temperature, before top-k and top-p; `cond_logp` and
    `null_logp` are of the two branches at the same temperature. `stats` holds what was asked for of "exact_kl", "js"
    (between the branches) and "entropy" (of the mixture that sampled), each (B, T); and "null_hidden" (B, T, D), what the
    head read in the null branch: with it `logp` scores the same mixture without a pass of that branch.
    """

    tokens: Tensor  # (B, T) int64
    cond_logp: Tensor  # (B, T) float32
    null_logp: Tensor | None  # (B, T) float32; None when sampled without a null branch
    sample_logp: Tensor  # (B, T) float32
    stats: dict[str, Tensor] = field(default_factory=dict)  # float32, but null_hidden as the trunk returns it


@dataclass(frozen=True)
class Scores:
    """Teacher-forced scores of given codes."""

    logp: Tensor  # (B, T) float32
    entropy: Tensor | None = None  # (B, T) float32


Generators = torch.Generator | Sequence[torch.Generator]  # one for all samples, or one for each of the B


class Policy(Protocol):
    """An autoregressive text-to-image model: T = H*W codes, one after another. All implementations are nn.Modules."""

    grid: tuple[int, int]  # (H, W) of the code map

    def condition(self, texts: Sequence[str | None], like: Condition | None = None) -> Condition:
        """Captions → Condition, without gradient. None is the model's own null prompt, under the mask of `like`'s row."""
        ...

    def read(self, text: str) -> Reading:
        """What of a caption the model does not read: words unknown to its tokenizer, and what is too long."""
        ...

    def sample(
        self,
        cond: Condition,
        null: Condition | None,
        *,
        group: int,
        guidance: float,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: Generators | None = None,
        stats: Collection[str] = (),
        given: Tensor | None = None,
        avoid: Tensor | None = None,
    ) -> Rollout:
        """P rows of cond and null → B = P*group samples of null + guidance * (cond − null), in logits.

        With a generator for each sample, a sample's random numbers do not depend on the batch that it is in. `given`
        (P, n): the codes that images begin with, n < T; the rollout is of the T − n others. `avoid` (P,): a code that is
        not drawn as the first of them; log-probs stay those of all codes.
        """
        ...

    def rescore(
        self,
        cond: Condition,
        null: Condition | None,
        tokens: Tensor,
        *,
        guidance: float = 1.0,
        temperature: float = 1.0,
        stats: Collection[str] = (),
    ) -> Rollout:
        """Teacher-forced, without gradient: what the sampler would know of codes (B, T), whoever made them. B rows each."""
        ...

    def logp(
        self,
        cond: Condition,
        tokens: Tensor,
        *,
        temperature: float = 1.0,
        null: Condition | Tensor | None = None,
        guidance: float = 1.0,
        entropy: bool = False,
    ) -> Scores:
        """Teacher-forced, differentiable log-probs of tokens (B, T). With `null`, of the guided mixture: the null prompts, or
        "null_hidden" (B, T, D) of the rollout."""
        ...

    def set_trainable(self) -> list[torch.nn.Parameter]:
        """Freezes what reinforcement learning leaves alone (text encoder, tokenizer); returns the rest."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]: ...

    def requires_grad_(self, requires_grad: bool = True) -> Self: ...

    def decode(self, tokens: Tensor) -> Sequence[Image.Image]:
        """Codes (N, T) → N RGB images; as `gcpo_t2i.models.pictures.Pictures` they can stay on the device."""
        ...

    def encode(self, images: Any) -> Tensor: ...

    @property
    def codebook(self) -> Tensor:
        """(V, D) the image tokenizer's vectors of the codes, frozen."""
        ...

    def save_pretrained(self, path: str | Path) -> None: ...

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self: ...
