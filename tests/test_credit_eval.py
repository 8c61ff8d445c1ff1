"""`gcpo-t2i credit-eval`: metrics and estimators by hand and against an enumerated world; the command on a tiny policy."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import VQModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from gcpo_t2i.cli import main
from gcpo_t2i.config import CreditEvalConfig, RewardConfig
from gcpo_t2i.credit_eval import continuations
from gcpo_t2i.credit_eval.advantage import FOLDS, UNIT, Call, Tally, calls, departures, product, units, values
from gcpo_t2i.credit_eval.companions import GROUP, group_scores
from gcpo_t2i.credit_eval.decisions import Truth, best_held, cosines, densities, find_decisions, held, quarters, thirds
from gcpo_t2i.credit_eval.intervals import Interval, Resamples, median
from gcpo_t2i.credit_eval.metrics import auroc, average_precision, density_ratio, inside, membership
from gcpo_t2i.credit_eval.objects import of_images, of_scene
from gcpo_t2i.credit_eval.phrases import cases, phrases_of, without
from gcpo_t2i.credit_eval.rules import RULES, all_scores, mean_of_others
from gcpo_t2i.credit_eval.samples import Sampler, Samples
from gcpo_t2i.data import Prompt
from gcpo_t2i.models.llamagen import LlamaGenPolicy
from gcpo_t2i.scoring import RewardSet
from gcpo_t2i.shapes import Object, Scene, render
from gcpo_t2i.shapes.prompts import all_specs
from tests.tiny import tiny_policy

# --- metrics ------------------------------------------------------------------


def test_auroc_and_average_precision_by_hand() -> None:
    scores, mask = np.array([3.0, 2.0, 2.0, 1.0]), np.array([True, False, True, False])
    assert auroc(scores, mask) == 3.5 / 4  # of the four pairs inside × outside one is a tie
    # thresholds 3, 2: precision 1 for half of the recall, then 2 of 3
    assert average_precision(scores, mask) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert auroc(-scores, mask) == 0.5 / 4


def test_auroc_is_the_share_of_ordered_pairs() -> None:
    generator = np.random.default_rng(0)
    scores, mask = generator.integers(0, 5, 60).astype(float), generator.random(60) < 0.3
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[mask] for b in scores[~mask]]
    assert auroc(scores, mask) == pytest.approx(np.mean(pairs))


def test_constant_scores_are_what_chance_gives() -> None:
    mask = np.array([True, False, False, False, True])
    assert auroc(np.zeros(5), mask) == 0.5
    assert average_precision(np.zeros(5), mask) == pytest.approx(0.4)
    assert membership(np.zeros(5), 0.3) == pytest.approx([0.3] * 5)
    assert math.isnan(auroc(np.zeros(5), np.zeros(5, bool))) and math.isnan(auroc(np.zeros(5), np.ones(5, bool)))


def test_membership_and_shares_by_hand() -> None:
    # the highest 2.5 of 5: the 5, and 1.5 for the two that are equal
    assert membership(np.array([5.0, 1.0, 3.0, 3.0, 0.0]), 0.5).tolist() == [1, 0, 0.75, 0.75, 0]
    assert inside(np.array([1.0, 3.0, 0.0]), np.array([True, False, True])) == 0.25
    named, other = np.array([True, True, False, False]), np.array([False, False, True, False])
    assert density_ratio(np.array([2.0, 4.0, 1.5, 9.0]), named, other) == 2.0
    assert density_ratio(np.zeros(4), named, other) == 1.0
    assert density_ratio(np.array([1.0, 0, 0, 0]), named, other) == math.inf


def test_intervals_are_of_images_drawn_tag_by_tag() -> None:
    below = np.array([1.0, 2.0, 3.0, 4.0])
    proportional = Resamples(["a", "a", "b", "b"]).ratio(below * 0.25, below)
    assert (proportional.mean, proportional.low, proportional.high) == pytest.approx((0.25, 0.25, 0.25))
    # of two images n − 1 = 1 is drawn: the ratio is that of one or the other
    assert Resamples(["a", "a"]).ratio(np.array([1.0, 4.0]), np.array([2.0, 2.0])) == Interval(1.25, 0.5, 2.0)
    # one of tag a (weight 2) and one of tag b (weight 2): the least is 0 + 10, the most 2 + 20, of 1 + 30 for all
    drawn = Resamples(["a", "a", "b", "b"]).ratio(np.array([0.0, 1.0, 5.0, 10.0]), np.ones(4))
    assert drawn == Interval(4.0, 10 / 4, 22 / 4)
    assert Resamples(["a", "a", "b"]).ratio(below[:3], below[:3]) == Interval(1.0, None, None)
    assert Resamples(["a", "a"]).cosine(np.ones(2), np.full(2, 4.0), np.ones(2)) == Interval(0.5, 0.5, 0.5)


def test_the_values_of_an_image_stay_together_in_a_median() -> None:
    assert median([[1.0, 2.0], [3.0, 4.0]]) == Interval(2.5, 1.5, 3.5)  # image 0 twice, both, or image 1 twice
    assert median([[1.0, 2.0, 6.0]]) == Interval(2.0, None, None)


# --- rules --------------------------------------------------------------------


def test_rules_are_what_they_say() -> None:
    cond, null = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-2.0, -2.0]])
    stats = {name: torch.tensor([[0.1, 0.2]]) for name in ("exact_kl", "js", "entropy", "stage", "critical")}
    scores = all_scores({"cond_logp": cond, "null_logp": null, "sample_logp": cond, **stats}, np.zeros((1, 2)), 0)
    assert set(scores) == set(RULES)
    assert scores["k3"][0] == pytest.approx([math.exp(-1), 0])  # exp(−1) + 1 − 1
    assert scores["log_ratio"].tolist() == [[1, 0]]
    assert scores["surprise"].tolist() == [[1, 2]]
    assert mean_of_others(np.array([[1.0, 0.0], [2.0, 4.0], [6.0, 8.0]])).tolist() == [[4, 6], [3.5, 4], [1.5, 2]]


def test_companions_are_the_group_that_an_image_is_held_against(
    reward_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, rewards = tiny_policy(), RewardSet.load([RewardConfig(f"{reward_file}:bright")])
    sampler = Sampler(policy, rewards, CreditEvalConfig(batch_size=8), torch.device("cpu"))
    prompts = [Prompt("a red circle"), Prompt("two blue square")]
    own = sampler.images(prompts)

    def scores() -> dict[str, Tensor]:
        return group_scores(sampler, prompts, own.tokens, own.tensors["entropy"], "images", tmp_path)

    found = scores()
    stored = load_file(tmp_path / "companions-images-2.safetensors")
    assert stored["tokens"].shape == (2, GROUP - 1, 16)
    for image in range(2):
        everyone = torch.tensor([own.rewards[image], *stored["rewards"][image].tolist()])
        above = everyone > everyone.mean()
        for place in range(16):
            vector = policy.codebook[own.tokens[image, place]]
            cosines = [
                torch.cosine_similarity(vector, policy.codebook[stored["tokens"][image, j, place]], dim=0).item()
                for j in range(GROUP - 1)
                if above[1 + j] != above[0]
            ]
            assert found["stage"][image, place].item() == pytest.approx((1 - np.mean(cosines)) / 2, abs=1e-5)
    assert found["critical"].sum(dim=1).tolist() == [3, 3] and (found["critical"][:, 0] == 1).all()
    monkeypatch.setattr(Sampler, "drawn", None)
    assert all(torch.equal(tensor, scores()[name]) for name, tensor in found.items())  # from the file


# --- the estimator ------------------------------------------------------------


def test_values_by_hand() -> None:
    """V_2 = R = 1, V_1 = 0.8 · 1 + 0.2 · 0 = 0.8, V_0 = 0.5 · 0.8 + 0.5 · 0.4 = 0.6."""
    others = np.array([0.4, 0.0]).reshape(1, 2, 1)
    found = values(np.array([1.0]), np.array([[0.5, 0.2]]), others)
    assert found[0, :, 0] == pytest.approx([0.6, 0.8, 1.0])
    others[0, 1] = np.nan  # nothing was run there: V_1 = V_2
    assert values(np.array([1.0]), np.array([[0.5, 0.2]]), others)[0, :, 0] == pytest.approx([0.7, 1.0, 1.0])


def test_product_of_folds_is_unbiased() -> None:
    """Over all 2^F equally likely outcomes of fair coins, whose mean is 1/2: 1/4, where the squared mean has 1/4 + 1/(4F)."""
    outcomes = np.array(list(itertools.product((0.0, 1.0), repeat=FOLDS)))
    assert product(outcomes, outcomes).mean() == pytest.approx(1 / 4)
    assert (outcomes.mean(1) ** 2).mean() == pytest.approx(1 / 4 + 1 / (4 * FOLDS))
    assert product(outcomes, 1 - outcomes).mean() == pytest.approx(1 / 4)


def test_continuations_go_where_images_can_be_left() -> None:
    logp = np.log([[0.25, 1.0, 0.99999, 0.999, 0.5]])
    departure = departures(logp)
    assert departure[0] == pytest.approx([0.75, 0, 1e-5, 1e-3, 0.5])
    assert units(departure, 64).tolist() == [[6, 0, 0, 1, 4]]  # 48, none, none, at least one unit, 32
    assert sum(len(call.rows) for call in calls(units(departure, 64), 4 * UNIT)) == 11
    assert [len(call.rows) for call in calls(units(departure, 64), 4 * UNIT)] == [4, 2, 1, 4]


def test_a_tally_keeps_folds_apart() -> None:
    tally = Tally.empty(2, 3)
    tally.add(Call(1, 0, np.array([0, 0])), np.arange(2.0 * UNIT))  # 0 … 7 and 8 … 15: fold 0 gets 0, 4, 8, 12
    assert tally.others()[0, 1].tolist() == [6, 7, 8, 9]
    assert np.isnan(tally.others()[1]).all() and np.isnan(tally.others()[0, [0, 2]]).all()
    assert tally.done == 1


@dataclass(frozen=True)
class Enumerated(Sampler):
    """A sampler whose reward is looked up by the image's code words, so that every expectation can be summed up."""

    table: np.ndarray

    def value(self, tokens: Tensor, prompts: Sequence[Prompt]) -> np.ndarray:
        return self.table[(tokens * torch.tensor([16, 4, 1])).sum(1).numpy()]


WORDS = torch.tensor(list(itertools.product(range(4), repeat=3)))  # all images of 3 codes out of 4
PROMPT = Prompt("a red circle")


def enumerated_world() -> tuple[Enumerated, np.ndarray, np.ndarray, np.ndarray]:
    """A guided policy of 64 possible images; their log-probs (64, 3), values V (64, 4) and Q (64, 3), by summation."""
    small = tiny_policy(1)
    vq = VQModel(block_out_channels=(4,), num_vq_embeddings=4, norm_num_groups=4, latent_channels=4)
    policy = LlamaGenPolicy.build(
        tokenizer=small.tokenizer, vq_model=vq, grid=(1, 3), caption_tokens=8, dim=16, layers=1, heads=2, text_dim=16
    ).eval()
    config = CreditEvalConfig(guidance=2.0, batch_size=4096)
    table = np.random.default_rng(3).random(64)
    world = Enumerated(policy, RewardSet({}, {}), config, torch.device("cpu"), table)
    logp = world.rescored([PROMPT] * 64, WORDS)["sample_logp"].double().numpy()
    chance = np.exp(logp.sum(1))
    assert chance.sum() == pytest.approx(1, abs=1e-5)
    value, other = np.empty((64, 4)), np.empty((64, 3))
    for i, word in enumerate(WORDS):
        same = [(WORDS[:, :t] == word[:t]).all(1).numpy() for t in range(4)]
        value[i] = [np.average(table[own], weights=chance[own]) for own in same]
        left = [same[t] & ~same[t + 1] for t in range(3)]
        other[i] = [np.average(table[own], weights=chance[own]) for own in left]
    return world, logp, value, other


def estimated(world: Enumerated, logp: np.ndarray, image: int, copies: int, continuations: int) -> Truth:
    """As many independent estimates for one image."""
    tensors = {"sample_logp": torch.from_numpy(logp[[image] * copies])}
    tokens = WORDS[image].expand(copies, 3)
    samples = Samples([PROMPT] * copies, tokens, tensors, world.value(tokens, []))
    planned = units(departures(tensors["sample_logp"].numpy()), continuations)
    tally = Tally.empty(*planned.shape)
    for call in calls(planned, world.config.batch_size):
        tally.add(call, world.continued(samples, call))
    return Truth.of(samples, tally)


def test_values_follow_exactly_from_those_of_the_others() -> None:
    world, logp, value, other = enumerated_world()
    found = values(world.table, departures(logp), other[..., None])[..., 0]
    np.testing.assert_allclose(found, value, atol=1e-6)
    chance, delta = np.exp(logp.sum(1)), np.diff(value, axis=1)
    variance = chance @ world.table**2 - (chance @ world.table) ** 2
    assert chance @ (delta**2).sum(1) == pytest.approx(variance, rel=1e-4)  # the identity that runs are checked with


@pytest.mark.parametrize("image", [0, 27, 54])
def test_estimates_are_unbiased(image: int) -> None:
    """1600 estimates, each from 8 continuations at a position: their mean is the enumerated one, within 4.5 standard errors."""
    world, logp, value, _ = enumerated_world()
    truth, delta = estimated(world, logp, image, 1600, 8), np.diff(value[image])
    gap = world.table[image] - value[image, 0]

    def errors(found: np.ndarray, expected: Any) -> np.ndarray:
        return (found.mean(0) - expected) / (found.std(0, ddof=1) / math.sqrt(len(found)) + 1e-9)

    assert np.abs(errors(truth.delta.mean(-1), delta)).max() < 4.5
    assert np.abs(errors(truth.squares, delta**2)).max() < 4.5
    assert abs(errors(truth.variance, gap**2)) < 4.5
    naive = (truth.delta.mean(-1) ** 2).sum(1)
    assert errors(naive, (delta**2).sum()) > 4.5  # which squares of means are not
    assert errors(naive - truth.noise, (delta**2).sum()) < 4.5


# --- what is said of the advantage ------------------------------------------------


def exact(delta: list[list[float]]) -> Truth:
    """A truth without noise: every fold says the same."""
    folds = np.repeat(np.array(delta)[..., None], FOLDS, axis=-1)
    gap = folds.sum(1)
    return Truth(folds, gap, product(folds, folds), product(gap, gap))


def test_held_and_best_by_hand() -> None:
    truth = exact([[2.0, -1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 3.0]])
    assert truth.noise == pytest.approx([0, 0])
    scores = np.array([[0.0, 9.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert held(scores, truth.squares, 0.25) == pytest.approx([1, 10 / 4])
    assert best_held(truth.delta, 0.25) == pytest.approx([4, 9])


def test_the_best_order_is_not_chosen_by_luck() -> None:
    """Where nothing but noise was estimated, the best order holds nothing; ordered by itself, noise holds a lot."""
    noise = np.random.default_rng(0).normal(size=(400, 20, FOLDS))
    squares = product(noise, noise)
    assert abs(best_held(noise, 0.2).mean()) < 0.1
    assert held(squares, squares, 0.2).mean() > 1


def test_cosine_of_uniform_credit() -> None:
    """ΣΔV² = Var gives 1/√T; an advantage that is the same everywhere is what uniform credit says."""
    flat = exact([[0.5, 0.5], [-1.0, -1.0]])
    zeros = np.zeros((2, 2))
    scores = dict.fromkeys(RULES, zeros)
    assert cosines(flat, scores, ["a", "a"])["uniform"]["mean"].mean == pytest.approx(1)
    martingale = exact([[0.5, 0.5], [0.5, -0.5], [-0.5, 0.5], [-0.5, -0.5]])
    scores = dict.fromkeys(RULES, np.zeros((4, 2)))
    assert martingale.squares.sum() == pytest.approx(martingale.variance.sum())
    assert cosines(martingale, scores, ["a"] * 4)["uniform"]["none"].mean == pytest.approx(1 / math.sqrt(2))
    one = exact([[0.0, 3.0], [0.0, -2.0]])  # all of it in the second token, and credit by evidence sees it
    scores["k3"] = np.array([[0.0, 5.0], [0.0, 5.0]])
    found = cosines(one, {**dict.fromkeys(RULES, zeros), "k3": scores["k3"]}, ["a", "a"])
    assert found["k3"]["mean"].mean == pytest.approx(1)
    assert found["uniform"]["mean"].mean == pytest.approx(1 / math.sqrt(2))
    assert "mean" not in found["log_ratio"] and "power_rank" in found["log_ratio"]


def test_places_by_hand() -> None:
    masks = [[np.array([0, 1, 1, 1, 1, 0, 0, 0], bool)], []]
    regions = thirds(masks, 8)
    assert {name: np.flatnonzero(cells[0]).tolist() for name, cells in regions.items()} == {
        "object's first third": [1, 2], "middle third": [3], "last third": [4], "outside": [0, 5, 6, 7],
    }  # fmt: skip
    assert regions["outside"][1].all()
    assert np.flatnonzero(quarters(1, 8)["second quarter"]).tolist() == [2, 3]
    credit = np.array([[0.0, 3.0, 1.0, 0.0, 4.0, 0.0, 0.0, 0.0], [1.0] * 8])  # mean 1 overall
    found = densities({"credit": credit}, regions, ["a", "a"])["credit"]
    assert found["object's first third"].mean == 2.0 and found["middle third"].mean == 0.0
    assert found["outside"].mean == pytest.approx(8 / 12)


# --- objects and phrases ----------------------------------------------------------


def test_phrases_of_a_clause() -> None:
    clauses = [{"class": "circle", "count": 1, "color": "orange"}, {"class": "square", "count": 1, "color": "blue"}]
    assert phrases_of(clauses, 0) == {"object": "orange circle", "colour": "orange"}
    assert phrases_of([{"class": "circle"}, {"class": "square"}], 1) == {"object": "square"}
    alike = [{"class": "circle", "color": "red"}, {"class": "square", "color": "red"}]
    assert phrases_of(alike, 0) == {"object": "red circle"}  # "red" names both


def test_a_prompt_without_a_phrase_is_a_prompt_of_the_world() -> None:
    known = {spec["prompt"] for spec in all_specs()}
    for spec in all_specs():
        if spec["tag"] in ("two_object", "color_attr"):
            for which in (0, 1):
                assert without(spec["prompt"], phrases_of(spec["include"], which)["object"]) in known


def test_cases_name_one_object_and_leave_the_other() -> None:
    scene = Scene((Object("circle", "red", 12, 0, 0), Object("square", "blue", 16, 24, 24)))
    include = [{"class": "circle", "count": 1, "color": "red"}, {"class": "square", "count": 1, "color": "blue"}]
    prompt = Prompt("a photo of a red circle and a blue square", None, {"tag": "color_attr", "include": include})
    objects = of_scene(scene)
    found = cases([prompt, prompt, prompt], [objects, objects[:1], [*objects, objects[0]]])  # one is missing, one twice
    assert [(case.image, case.kind) for case in found] == [
        (0, "color_attr: object"), (0, "color_attr: colour"), (0, "color_attr: object"), (0, "color_attr: colour"),
    ]  # fmt: skip
    assert found[3].prompt.negative == "a photo of a red circle and a square"
    assert found[3].named.reshape(12, 12)[6:10, 6:10].all() and found[3].named.sum() == 16
    assert not (found[0].named & found[0].other).any()


def test_the_detector_finds_the_cells_of_a_scene() -> None:
    scene = Scene((Object("circle", "red", 12, 0, 0), Object("square", "blue", 16, 24, 24)))
    [seen] = of_images([Image.fromarray(render(scene))])
    assert sorted(seen, key=lambda one: one[0])[0][:2] == ("circle", "red")
    for (shape, color, mask), known in zip(sorted(seen, key=lambda one: one[0]), of_scene(scene), strict=True):
        assert (shape, color) == known[:2]
        assert mask.tolist() == known[2].tolist()


# --- the command ------------------------------------------------------------------


@pytest.fixture(scope="module")
def arguments(tiny_folder: Path, reward_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    prompts = tmp_path_factory.mktemp("inputs") / "prompts.jsonl"
    texts = {"a photo of a red circle": "one", "two blue square": "two"}
    prompts.write_text("".join(json.dumps({"prompt": text, "tag": tag}) + "\n" for text, tag in texts.items()))
    return [
        *("credit-eval", "--model", str(tiny_folder), "--prompts", str(prompts), "--device", "cpu"),
        *("--rewards", json.dumps([{"name": f"{reward_file}:bright"}]), "--truths", "advantage"),
        *("--images_per_tag", "2", "--continuations", "8", "--batch_size", "32"),
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_a_killed_run_goes_on_and_gives_the_same(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--output_dir", str(tmp_path / "whole")]) == 0
    assert "Which tokens decided the reward" in capsys.readouterr().out
    monkeypatch.setattr(continuations, "SAVE_EVERY", 0.0)
    original, seen = Sampler.continued, []

    def interrupted(self: Sampler, samples: Samples, call: Call) -> np.ndarray:
        seen.append((call.position, call.number))
        if len(seen) == 6:
            raise KeyboardInterrupt
        return original(self, samples, call)

    monkeypatch.setattr(Sampler, "continued", interrupted)
    assert main([*arguments, "--output_dir", str(tmp_path / "cut")]) == 130
    assert main([*arguments, "--output_dir", str(tmp_path / "cut")]) == 0
    assert seen[5] == seen[6] and len(set(seen)) == len(seen) - 1  # what was cut off is done again, and nothing else
    whole, cut = contents(tmp_path / "whole"), contents(tmp_path / "cut")
    assert {"recipe.json", "samples.safetensors", "credit.json", "credit.md", "credit.png"} <= set(cut)
    assert whole.keys() == cut.keys()
    assert all(whole[name] == cut[name] for name in whole if not name.endswith(".png"))
    calls_before = len(seen)
    assert main([*arguments, "--output_dir", str(tmp_path / "cut")]) == 0
    assert len(seen) == calls_before  # all is there: rules are scored again from the file
    found = json.loads(cut["credit.json"])["advantage"]
    assert found["images"] == 4 and set(found["shares"]) == {*RULES, "best"}
    assert found["shares"]["uniform"]["share"]["0.2"]["mean"] == pytest.approx(0.2)
    assert found["curves"]["k3"][-1] == pytest.approx(1)


def test_refusals(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*more: str) -> str:
        assert main([*arguments, *more]) == 2
        return capsys.readouterr().err

    assert "4x4 codes" in refused("--truths", "objects", "--output_dir", str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    assert "already holds files" in refused("--output_dir", str(tmp_path / "mine"))
    assert "truths: at least one" in refused("--truths", "[]")
    folder = tmp_path / "run"
    assert main([*arguments, "--images_per_tag", "1", "--output_dir", str(folder)]) == 0
    capsys.readouterr()
    said = refused("--images_per_tag", "1", "--guidance", "3", "--output_dir", str(folder))
    assert "sampling.guidance: 3.0 here, 2.0 there" in said
    (folder / "continuations.safetensors").write_bytes(b"junk")
    assert "continuations.safetensors: damaged" in refused("--images_per_tag", "1", "--output_dir", str(folder))


def test_objects_and_phrases_of_the_embedded_model(tmp_path: Path) -> None:
    arguments = ["--scenes_per_tag", "2", "--images_per_tag", "1", "--device", "cpu", "--output_dir", str(tmp_path)]
    assert main(["credit-eval", "--truths", "objects", "phrases", *arguments]) == 0
    found = json.loads((tmp_path / "credit.json").read_text())
    for source in found["objects"].values():
        assert set(source) == set(RULES)
        assert source["uniform"]["auroc"]["overall"]["mean"] == 0.5
        assert source["uniform"]["inside/mean"] == source["uniform"]["inside/power_rank"]
    scenes = found["phrases"]["scenes"]
    assert scenes["images"] == {"two_object: object": 2, "color_attr: object": 2, "color_attr: colour": 2}
    assert scenes["ratios"]["mean"]["k3"]["two_object: object"]["mean"] > 1
    assert set(scenes["ratios"]["mean"]) < set(scenes["ratios"]["power_rank"])


def test_all_truths_share_the_images() -> None:
    """Places are told by objects where they are known, else by raster order alone."""
    generator = np.random.default_rng(0)
    tensors = {name: torch.rand(4, 16) for name in ("exact_kl", "js", "entropy", "stage", "critical")}
    tensors |= {name: -torch.rand(4, 16) for name in ("cond_logp", "null_logp", "sample_logp")}
    tags = [Prompt("x", None, {"tag": tag}) for tag in "aabb"]
    samples = Samples(tags, torch.zeros(4, 16, dtype=torch.int64), tensors, generator.random(4))
    tally = Tally(generator.random((4, 16, FOLDS)) * 9, np.full((4, 16, FOLDS), 9.0))
    mask = np.arange(16) < 6
    known = find_decisions(samples, tally, [[mask]] * 4, 0)["densities"]["ΔV²"]
    assert set(find_decisions(samples, tally, None, 0)["densities"]["ΔV²"]) < set(known)
    parts = ["object's first third", "middle third", "last third"]
    whole = sum(known[part].mean * 2 for part in parts) + known["outside"].mean * 10
    assert whole == pytest.approx(16)
