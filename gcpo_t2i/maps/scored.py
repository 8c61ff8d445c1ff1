"""A group of images of one prompt, scored: all that its maps are made of, so that they change without the policy.

    scored = sample_images(policy, described("a red circle"), rewards, Sampling(group=4, guidance=2.0), generator)
    scored.credit(CreditSettings())                       # (N, T), mean 1 per image
    scored.advantage_map(CreditSettings(contrast="js"))   # (N, T), credit × advantage: what an update would follow
    contrasted(policy, scored, "a circle")                # the same images against another negative prompt
    phrase_maps(policy, scored, ["red"])                  # where each phrase acts

Only sampling is sequential. All else scores the codes that are there (`Policy.rescore`), one pass for all of them.
Functions that take a policy run in the caller's autocast.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from gcpo_t2i.algo.advantage import group_advantage, has_spread
from gcpo_t2i.algo.credit import CONTRASTS, NORMALIZERS, CreditSettings, evidence
from gcpo_t2i.data import Prompt
from gcpo_t2i.errors import UserError
from gcpo_t2i.models.policy import Policy, Rollout
from gcpo_t2i.rollout import Sampling, conditions, draw
from gcpo_t2i.scoring import RewardSet, Scores

STATS = ("exact_kl", "js", "entropy")
CHUNK = 16  # images scored at a time
CONJUNCTIONS = {"and", "or"}
SAME = 1e-4  # nats: two predictions of a code that differ by less differ by rounding


@dataclass(frozen=True)
class ScoredImages:
    """N images of one prompt and everything that is known of them. All tensors are on the CPU."""

    prompt: Prompt
    grid: tuple[int, int]  # (H, W) of the code map, T = H*W
    tokens: Tensor  # (N, T) int64
    tensors: dict[str, Tensor]  # cond_logp, null_logp, exact_kl, js, entropy: (N, T) float32, nats
    images: list[Image.Image]  # N, decoded from the tokens
    scores: Scores  # reward → N scores
    verdicts: list[object]  # N, GenEval's on each image (rewards.geneval.Verdict), None where it says nothing
    rewards: Tensor  # (N,) float32, the weighted sum of the scores
    sampling: Sampling
    given: list[Image.Image] | None = None  # N pictures that the tokens encode; None: the images were sampled

    @property
    def pictures(self) -> list[Image.Image]:
        """What the rewards looked at, and what maps are drawn over: the given pictures, or else the images."""
        return self.given or self.images

    @property
    def advantage(self) -> Tensor:
        """(N,), of each image in its group, as in training; 0 where `no_advantage` says why there is none."""
        if self.no_advantage:
            return torch.zeros_like(self.rewards)
        return group_advantage(self.rewards[None]).flatten()

    @property
    def judged(self) -> bool:
        """Whether any reward says anything of any image."""
        return any(value is not None for values in self.scores.values() for value in values)

    @property
    def no_advantage(self) -> str | None:
        """Why the images have no advantage, if so."""
        if not self.judged:
            names = ", ".join(f"'{name}'" for name in self.scores)
            return f"{names} cannot judge this prompt"
        if len(self.rewards) == 1:
            return "one image has no group to be compared with"
        if not has_spread(self.rewards[None]).item():
            return "all images of the group have the same reward"
        return None

    @property
    def unmoved(self) -> Tensor:
        """(N,) bool: images of which prompt and negative prompt predict every code alike, so that nothing tells codes apart."""
        gap = (self.tensors["cond_logp"] - self.tensors["null_logp"]).abs().amax(dim=1)
        return (gap < SAME) | (self.prompt.negative == self.prompt.text)

    def credit(self, settings: CreditSettings) -> Tensor:
        """(N, T), mean 1 per image but for the normalizer `none`; uniform where `unmoved`, whose ranks would be of rounding."""
        mask = torch.ones_like(self.tokens, dtype=torch.bool)
        found = evidence(self.tensors, mask, settings).masked_fill(self.unmoved[:, None], 0.0)
        return NORMALIZERS[settings.normalizer].fn(found, mask, settings)

    def advantage_map(self, settings: CreditSettings) -> Tensor:
        """(N, T) credit × advantage: above 0 what the first update after sampling makes likelier, below 0 less likely."""
        return self.credit(settings) * self.advantage[:, None]


@torch.no_grad()
def sample_images(
    policy: Policy, prompt: Prompt, rewards: RewardSet, sampling: Sampling, generator: torch.Generator
) -> ScoredImages:
    """Draws `sampling.group` images and scores them. Same policy, prompt, settings and seed: those of `gcpo-t2i sample`.

    Without guidance only one branch is sampled, and the other scored afterwards. UserError from the rewards.
    """
    cond, null = conditions(policy, [prompt], with_null=sampling.guidance != 1.0)
    rollout = draw(policy, cond, null, sampling, generator, () if null is None else STATS)
    tensors = rescored(policy, prompt, rollout.tokens, sampling) if null is None else named_tensors(rollout)
    return _judged(prompt, policy, rewards, rollout.tokens, tensors, sampling)


@torch.no_grad()
def explain_images(
    policy: Policy, prompt: Prompt, rewards: RewardSet, pictures: Sequence[Image.Image], temperature: float = 1.0
) -> ScoredImages:
    """Given pictures, of the policy's own size (see `pictures.fit`), as if the policy had drawn their codes for this prompt."""
    tokens, sampling = policy.encode(pictures), Sampling(len(pictures), 1.0, temperature)
    tensors = rescored(policy, prompt, tokens, sampling)
    return _judged(prompt, policy, rewards, tokens, tensors, sampling, list(pictures))


def contrasted(policy: Policy, scored: ScoredImages, negative: str | None) -> ScoredImages:
    """The same images against another negative prompt, None for the model's own null prompt. Rewards stay."""
    prompt = replace(scored.prompt, negative=negative)
    tensors = rescored(policy, prompt, scored.tokens, scored.sampling)
    # of the mixture that sampled, which is not that of the new negative prompt
    return replace(scored, prompt=prompt, tensors={**tensors, "entropy": scored.tensors["entropy"]})


def phrase_maps(policy: Policy, scored: ScoredImages, phrases: Sequence[str]) -> dict[str, ScoredImages]:
    """Phrase → the images against the prompt without it: credit is where this phrase acts. UserError as `without`."""
    negatives = {phrase: without(scored.prompt.text, phrase) for phrase in phrases}
    return {phrase: contrasted(policy, scored, negative) for phrase, negative in negatives.items()}


def phrase_settings(settings: CreditSettings) -> CreditSettings:
    """How the map of a phrase is drawn: `mean` in place of `power_rank`, where the contrast has no sign.

    Ranks give four fifths of the weight to two fifths of the codes whatever the phrase, and a word acts on fewer: on drawn
    scenes of two objects, credit on the object that a phrase names was 1.2 times that on the other, with `mean` 3 to 5 times
    (docs/credit.md). Training is another matter: there, one code must not take a whole image's weight.
    """
    ranked = settings.normalizer == "power_rank" and not CONTRASTS[settings.contrast].signed
    return replace(settings, normalizer="mean") if ranked else settings


def without(text: str, phrase: str) -> str | None:
    """The prompt without a phrase, wherever it stands in it as whole words, in any case; None if nothing is left.

    What cannot stand alone goes with it: "a red circle and a blue square" without "blue square" is "a red circle", and "an
    orange circle" without "orange" is "a circle". UserError for a phrase that is not in the prompt.
    """
    words = r"\s+".join(re.escape(word) for word in phrase.split())
    pattern = rf"(?:\b(an?|the)\s+)?(?<!\w){words}(?!\w)\s*(\w*)"
    left, found = re.subn(pattern, _joined, text, flags=re.IGNORECASE) if words else (text, 0)
    if not found:
        raise UserError(f"phrase '{phrase}' is not in the prompt '{text[:200]}'; give words that stand there in a row")
    return " ".join(_without_strays(left.split())) or None


def _joined(cut: re.Match[str]) -> str:
    """What is left of article, phrase and next word."""
    article, following = cut[1], cut[2]
    if not article or not following or following.lower() in CONJUNCTIONS:
        return f" {following}"
    if article.lower() != "the":
        article = f"{article[0]}{'n' if following[0].lower() in 'aeiou' else ''}"
    return f" {article} {following}"


def _without_strays(words: list[str]) -> list[str]:
    """Without an "and" that has nothing to join."""
    for i, word in enumerate(words):
        before = words[i - 1].lower() if i else ""
        if word.lower() in CONJUNCTIONS and (i + 1 == len(words) or before in {"", "of", *CONJUNCTIONS}):
            return _without_strays(words[:i] + words[i + 1 :])
    return words


@torch.no_grad()
def rescored(policy: Policy, prompt: Prompt, tokens: Tensor, sampling: Sampling) -> dict[str, Tensor]:
    """What a rollout knows of codes (N, T) under the prompt and its negative prompt, teacher-forced, see `named_tensors`."""
    parts = []
    cond, null = conditions(policy, [prompt])
    assert null is not None
    for rows in tokens.split(CHUNK):
        rollout = policy.rescore(
            cond.repeat_interleave(len(rows)),
            null.repeat_interleave(len(rows)),
            rows.to(cond.mask.device),
            guidance=sampling.guidance,
            temperature=sampling.temperature,
            stats=STATS,
        )
        parts.append(named_tensors(rollout))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def named_tensors(rollout: Rollout) -> dict[str, Tensor]:
    """Those of `ScoredImages.tensors`."""
    assert rollout.null_logp is not None
    named = {"cond_logp": rollout.cond_logp, "null_logp": rollout.null_logp, **rollout.stats}
    return {name: tensor.float().cpu() for name, tensor in named.items()}


def _judged(
    prompt: Prompt,
    policy: Policy,
    rewards: RewardSet,
    tokens: Tensor,
    tensors: dict[str, Tensor],
    sampling: Sampling,
    given: list[Image.Image] | None = None,
) -> ScoredImages:
    images = list(policy.decode(tokens))
    scores, verdicts = rewards.judge(given or images, [prompt] * len(images))
    totals = torch.tensor(rewards.total(scores), dtype=torch.float32)
    return ScoredImages(prompt, policy.grid, tokens.cpu(), tensors, images, scores, verdicts, totals, sampling, given)
