"""`gcpo-t2i prompts geneval`: the official grammar, the mix, and what is left out."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from gcpo_t2i.cli import main
from gcpo_t2i.config import PromptsGenevalConfig, validate
from gcpo_t2i.config.base import ConfigError
from gcpo_t2i.config.prompts_geneval import MIX
from gcpo_t2i.data import load_prompts
from gcpo_t2i.errors import UserError
from gcpo_t2i.geneval_prompts import TEMPLATES, Words, allowed, draw, plain, shares, twins
from gcpo_t2i.scoring import geneval_words
from gcpo_t2i.shapes.prompts import (
    color_attr_spec,
    colors_spec,
    counting_spec,
    position_spec,
    single_spec,
    two_object_spec,
)

# Lines of GenEval's evaluation_metadata.jsonl, as published, with what makes them here
PUBLISHED = {
    '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}': single_spec(
        "bench"
    ),
    '{"tag": "counting", "include": [{"class": "bus", "count": 3}], "exclude": [{"class": "bus", "count": 4}], '
    '"prompt": "a photo of three buses"}': counting_spec("bus", 3),
    '{"tag": "colors", "include": [{"class": "dining table", "count": 1, "color": "black"}], '
    '"prompt": "a photo of a black dining table"}': colors_spec("dining table", "black"),
    '{"tag": "position", "include": [{"class": "tv", "count": 1}, {"class": "clock", "count": 1, '
    '"position": ["below", 0]}], "prompt": "a photo of a clock below a tv"}': position_spec("clock", "below", "tv"),
    '{"tag": "color_attr", "include": [{"class": "pizza", "count": 1, "color": "blue"}, {"class": "baseball glove", '
    '"count": 1, "color": "yellow"}], "prompt": "a photo of a blue pizza and a yellow baseball glove"}': color_attr_spec(
        "pizza", "blue", "baseball glove", "yellow"
    ),
}


@pytest.mark.parametrize(("line", "spec"), PUBLISHED.items())
def test_published_lines_are_in_the_grammar_to_the_letter(line: str, spec: dict) -> None:
    assert json.dumps(spec) == line


def test_articles_and_plurals_are_the_official_ones() -> None:
    assert two_object_spec("orange", "umbrella")["prompt"] == "a photo of an orange and an umbrella"
    assert colors_spec("apple", "orange")["prompt"] == "a photo of an orange apple"
    plurals = {"bench": "benchs", "wine glass": "wine glasses", "knife": "knifes", "sheep": "sheeps"}
    assert {name: counting_spec(name, 4)["prompt"] for name in plurals} == {
        name: f"a photo of four {many}" for name, many in plurals.items()
    }


@pytest.mark.parametrize(
    ("number", "expected"),
    # 17 parts: one thousand is 411.76, 294.12, 176.47, 58.82, 58.82; whole parts 997, three more by the largest remainders
    [
        (17, [7, 5, 3, 1, 1, 0]),
        (1000, [412, 294, 176, 59, 59, 0]),
        (1, [1, 0, 0, 0, 0, 0]),  # 7/17 is the largest remainder
    ],
)
def test_the_mix_is_kept_to_the_last_prompt(number: int, expected: list[int]) -> None:
    assert list(shares(number, MIX).values()) == expected
    assert sum(expected) == number
    specs = draw(number, MIX, set(), seed=0)
    assert Counter(spec["tag"] for spec in specs) == Counter(dict(zip(MIX, expected, strict=True)))


def test_same_seed_same_prompts_and_tags_do_not_disturb_each_other() -> None:
    one, again, other = (draw(300, MIX, set(), seed) for seed in (1, 1, 2))
    assert one == again and one != other
    positions = draw(70, {"position": 1}, set(), 1)
    mixed = [spec for spec in draw(170, MIX, set(), 1) if spec["tag"] == "position"]
    assert sorted(map(str, positions)) == sorted(map(str, mixed))


def test_every_prompt_fits_its_metadata() -> None:
    classes, colors = geneval_words()
    assert (len(classes), len(colors)) == (80, 10)
    for spec in draw(3000, dict.fromkeys(TEMPLATES, 1), set(), seed=0):
        names = [clause["class"] for clause in spec["include"]]
        own = [clause["color"] for clause in spec["include"] if "color" in clause]
        assert set(names) <= set(classes) and len(set(names)) == len(names) and set(own) <= set(colors)
        assert len(set(own)) == len(own) and not (own and "person" in names)
        assert len(names) == (2 if spec["tag"] in ("two_object", "position", "color_attr") else 1)
        assert all(name in spec["prompt"] for name in (*names, *own))


def test_twins_are_all_that_two_objects_can_swap() -> None:
    assert twins(two_object_spec("cat", "dog")) == ["a photo of a cat and a dog", "a photo of a dog and a cat"]
    assert set(twins(position_spec("cat", "left of", "dog"))) == {
        "a photo of a cat left of a dog",
        "a photo of a dog left of a cat",
        "a photo of a cat right of a dog",
        "a photo of a dog right of a cat",
    }
    assert set(twins(color_attr_spec("cat", "red", "dog", "blue"))) == {
        "a photo of a red cat and a blue dog",
        "a photo of a blue dog and a red cat",
        "a photo of a blue cat and a red dog",
        "a photo of a red dog and a blue cat",
    }
    assert twins(counting_spec("cat", 2)) == ["a photo of two cats"]
    for tag, template in TEMPLATES.items():  # each twin has the same twins, so it does not matter which one is excluded
        spec = template(Words(*geneval_words()), random.Random(tag))
        assert spec["prompt"] in twins(spec)


def test_excluded_prompts_and_their_twins_never_come() -> None:
    classes, colors = geneval_words()
    few = Words(classes[14:17], colors[:3])  # bird, cat, dog; red, orange, yellow
    excluded = {"a photo of a cat left of a dog", "a photo of a red cat and an orange dog", "a photo of two birds"}
    for tag in ("position", "color_attr", "counting"):
        source = allowed(tag, few, excluded, random.Random(0))
        texts = {next(source)["prompt"] for _ in range(1500)}
        # position: 6 ordered pairs x 4 relations, less 4 twins. color_attr: 6 x 6, less the 4 twins. counting: 3 x 3 - 1.
        assert len(texts) == {"position": 20, "color_attr": 32, "counting": 8}[tag]
        assert not texts & {twin for text in excluded for twin in (text, "a photo of a dog left of a cat")}
    assert plain("A photo  of two Birds. ") in excluded


def test_a_tag_of_which_nothing_is_left_is_named() -> None:
    words = Words(("cat", "dog"), ("red", "blue"))
    texts = {"a photo of a cat", "a photo of a dog"}
    with pytest.raises(UserError, match="mix: the prompts to exclude leave next to nothing of the tag 'single_object'"):
        next(allowed("single_object", words, texts, random.Random(0)))


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = tmp_path / "evaluation_metadata.jsonl"
    evaluation.write_text("".join(line + "\n" for line in PUBLISHED))
    out = tmp_path / "new" / "train.jsonl"
    command = ["prompts", "geneval", "--n", "340", "--exclude", str(evaluation), "--out", str(out)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "gcpo-t2i train --train_prompts" in said and '"position": 7, "counting": 5' in said and str(out) in said
    prompts = load_prompts(str(out))
    assert len(prompts) == 340 and not {p.text for p in prompts} & {spec["prompt"] for spec in PUBLISHED.values()}
    first = out.read_bytes()
    assert main(command) == 2 and "is already there; add --overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0 and out.read_bytes() == first
    assert main([*command, "--overwrite", "--mix", '{"counting": 1}']) == 0
    assert {prompt.columns["tag"] for prompt in load_prompts(str(out))} == {"counting"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mix": {"color": 1}}, "mix: the tag 'color' is unknown; did you mean 'colors'"),
        ({"mix": {"colors": -1}}, "the share of 'colors' must be >= 0, not -1"),
        ({"mix": {"colors": 0}}, "at least one tag needs a share above 0"),
        ({"out": "prompts.txt"}, "must end with .jsonl"),
        ({"n": 0}, "n must be > 0"),
    ],
)
def test_settings_that_cannot_be(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(PromptsGenevalConfig(**settings))
