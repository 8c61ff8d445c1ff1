"""Batches by hand: cutting, joining, and replacing groups without signal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from gcpo_t2i.algo.advantage import has_spread
from gcpo_t2i.data import Prompt
from gcpo_t2i.models.policy import Condition, Rollout
from gcpo_t2i.processes import Processes
from gcpo_t2i.rollout import Batch, collect, first_in_turn, join


def batch(names: Sequence[str], rewards: list[list[float]], seconds: float = 1.0) -> Batch:
    """Two samples of three codes each per prompt; every number of a sample is its running index."""
    prompts, group = len(names), len(rewards[0])
    index = torch.arange(prompts * group, dtype=torch.float32)
    wide = index[:, None].expand(-1, 3)
    return Batch(
        prompts=[Prompt(name) for name in names],
        cond=Condition(torch.arange(float(prompts))[:, None, None], torch.ones(prompts, 1, dtype=torch.bool)),
        null=None,
        rollout=Rollout(wide.long(), wide, None, wide, {"entropy": wide}),
        images=[Image.new("RGB", (2, 2), (i, 0, 0)) for i in range(prompts * group)],
        scores={"r": [x for row in rewards for x in row]},
        rewards=torch.tensor(rewards),
        seconds={"rollout": seconds, "reward": seconds},
    )


def test_groups_keep_everything_that_belongs_to_a_prompt() -> None:
    part = batch(["a", "b", "c"], [[0, 1], [2, 3], [4, 5]]).groups([2, 0])
    assert [prompt.text for prompt in part.prompts] == ["c", "a"]
    assert part.rollout.tokens[:, 0].tolist() == [4, 5, 0, 1]
    assert part.rollout.stats["entropy"][:, 2].tolist() == [4, 5, 0, 1]
    assert [image.getpixel((0, 0))[0] for image in part.images] == [4, 5, 0, 1]
    assert part.scores == {"r": [4, 5, 0, 1]}
    assert part.rewards.tolist() == [[4, 5], [0, 1]]
    assert part.cond.states.flatten().tolist() == [2, 0]
    assert part.rollout.null_logp is None and "null_logp" not in part.tensors()


def test_join_is_the_inverse_of_groups() -> None:
    whole = batch(["a", "b", "c"], [[0, 1], [2, 3], [4, 5]])
    whole = replace(whole, success=whole.rewards > 2)
    again = join([whole.groups([0]), whole.groups([]), whole.groups([1, 2])])
    assert torch.equal(again.rollout.tokens, whole.rollout.tokens)
    assert torch.equal(again.rewards, whole.rewards)
    assert again.success is not None and again.success.tolist() == [[False, False], [False, True], [True, True]]
    assert again.scores == whole.scores and again.prompts == whole.prompts and again.images == whole.images


def sampler(*rounds: Batch) -> Callable[[], Batch]:
    left = list(rounds)
    return lambda: left.pop(0)


def test_without_a_rule_the_first_batch_is_the_batch() -> None:
    first = batch(["a", "b"], [[1, 1], [0, 1]])
    sample = sampler(first)
    got, drawn = collect(sample, keep=None, max_rounds=3)
    assert got is first and drawn == [first]


def test_groups_without_signal_are_replaced_by_fresh_prompts() -> None:
    sample = sampler(
        batch(["a", "b"], [[1, 1], [0, 1]]), batch(["c", "d"], [[0, 0], [1, 1]]), batch(["e", "f"], [[2, 0], [0, 3]])
    )
    got, drawn = collect(sample, keep=has_spread, max_rounds=3)
    assert [prompt.text for prompt in got.prompts] == ["b", "e"]  # f is one more than asked for
    assert got.rewards.tolist() == [[0, 1], [2, 0]]
    assert [part.rewards.tolist() for part in drawn] == [[[1, 1], [0, 1]], [[0, 0], [1, 1]], [[2, 0], [0, 3]]]
    assert got.seconds == {"rollout": 3.0, "reward": 3.0}  # all three rounds were paid for


def test_rounds_are_bounded_and_what_is_left_is_used() -> None:
    sample = sampler(batch(["a", "b"], [[1, 1], [0, 1]]), batch(["c", "d"], [[0, 0], [1, 1]]))
    got, drawn = collect(sample, keep=has_spread, max_rounds=2)
    assert [prompt.text for prompt in got.prompts] == ["b"] and len(drawn) == 2


def test_no_signal_at_all_still_gives_a_batch() -> None:
    sample = sampler(batch(["a"], [[1, 1]]), batch(["b"], [[0, 0]]))
    got, _ = collect(sample, keep=has_spread, max_rounds=2)
    assert [prompt.text for prompt in got.prompts] == ["b"]


class Two(Processes):
    """The first of two processes, and what the second one says, in this order."""

    said: list[int]

    def __init__(self, *said: int) -> None:
        super().__init__(0, 2)
        object.__setattr__(self, "said", list(said))  # frozen, as what processes share is

    def gather(self, own: Any) -> list[Any]:
        return [own, self.said.pop(0)]


def test_two_processes_sample_until_both_together_have_enough() -> None:
    rounds = [batch(["a", "b"], [[1, 1], [0, 1]]), batch(["c", "d"], [[0, 2], [0, 3]])]
    got, drawn = collect(sampler(*rounds), keep=has_spread, max_rounds=3, processes=Two(2, 0, 1))
    # wanted 2 + 2; first round 1 here and 0 there, second 2 here and 1 there: the first four are all
    assert [prompt.text for prompt in got.prompts] == ["b", "c", "d"] and len(drawn) == 2


def test_a_process_left_with_nothing_is_idle() -> None:
    flat = batch(["a", "b"], [[1, 1], [2, 2]])
    got, _ = collect(sampler(flat), keep=has_spread, max_rounds=1, processes=Two(2, 2))
    assert got.idle and len(got.prompts) == 1 and not got.mask.any()
    got, _ = collect(sampler(flat), keep=has_spread, max_rounds=1, processes=Two(2, 0))
    assert [p.text for p in got.prompts] == [
        "a",
        "b",
    ] and got.mask.all()  # nobody has a signal


def test_only_selected_codes_are_learned_from() -> None:
    part = replace(batch(["a"], [[0, 1]]), selected=torch.tensor([[True, False, True], [False, True, False]]))
    assert part.mask.tolist() == [[True, False, True], [False, True, False]]
    assert not replace(part, idle=True).mask.any()


def test_first_in_turn() -> None:
    assert first_in_turn([[1, 2], [3, 1]], 4) == [[1, 2], [1, 0]]
    assert first_in_turn([[1, 2], [3, 1]], 9) == [[1, 2], [3, 1]]
