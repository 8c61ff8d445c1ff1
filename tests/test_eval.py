"""`gcpo-t2i eval` from the command line, on a policy of random weights: files, numbers, pairs, resuming, and refusals."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from gcpo_t2i.cli import main
from gcpo_t2i.evals.generate import batches
from gcpo_t2i.evals.recipe import differences, policy_hash
from gcpo_t2i.files import whole_file
from gcpo_t2i.seeds import image_seed

# A detector for pictures of noise: a circle if they are rather dark, else a square.
DETECTOR = """
import numpy as np
from rewards.boxes import Detection

class Dark:
    classes = ("circle", "square")

    def __call__(self, images):
        names = ["circle" if np.asarray(image).mean() < LEVEL else "square" for image in images]
        return [[Detection(name, (0, 0, 9, 9), 1.0)] for name in names]
"""
SPECS = [
    {"tag": "a", "include": [{"class": "circle", "count": 1}], "prompt": "a photo of a circle"},
    {"tag": "a", "include": [{"class": "square", "count": 1}], "prompt": "a photo of a square"},
    {"tag": "b", "include": [{"class": "circle", "count": 1}], "prompt": "a photo of a red circle"},
    {"tag": "b", "include": [{"class": "circle", "count": 1}], "prompt": "a photo of a red circle"},
]
IMAGES = [(prompt, sample) for prompt in range(4) for sample in range(2)]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, reward_file: Path) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "prompts.jsonl").write_text("".join(json.dumps(spec) + "\n" for spec in SPECS))
    (folder / "detector.py").write_text(DETECTOR.replace("LEVEL", "153.5"))
    rewards = [
        {"name": "geneval", "kwargs": {"score": "strict", "detector": f"{folder / 'detector.py'}:Dark"}},
        {"name": f"{reward_file}:bright"},
    ]
    return [
        *("eval", "--model", str(tiny_folder), "--prompts", str(folder / "prompts.jsonl"), "--device", "cpu"),
        *("--samples_per_prompt", "2", "--batch_size", "3", "--rewards", json.dumps(rewards)),
    ]


@pytest.fixture(scope="module")
def finished(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation. Read only."""
    folder = tmp_path_factory.mktemp("finished") / "base"
    assert main([*arguments, "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.fixture
def error(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command that must fail with exit code 2, and returns its one line."""

    def run(arguments: Sequence[str]) -> str:
        capsys.readouterr()
        assert main(list(arguments)) == 2
        line = capsys.readouterr().err
        assert line.startswith("gcpo-t2i: error: ") and line.count("\n") == 1
        return line.removeprefix("gcpo-t2i: error: ").rstrip("\n")

    return run


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.glob("*/samples/*.png")}


def external(arguments: Sequence[str]) -> list[str]:
    """The same evaluation of images that exist: without what is about sampling."""
    return ["eval", "--device", "cpu", *arguments[arguments.index("--rewards") :]]


# --- what it writes -----------------------------------------------------------


def test_the_folder_is_genevals(finished: Path) -> None:
    expected = {f"{prompt:05d}/samples/{sample:04d}.png" for prompt, sample in IMAGES}
    assert pictures(finished).keys() == expected
    for number, spec in enumerate(SPECS):
        assert json.loads((finished / f"{number:05d}" / "metadata.jsonl").read_text()) == spec
        assert Image.open(finished / f"{number:05d}" / "grid.png").width > 2 * 96  # two images, enlarged
    assert {path.name for path in finished.iterdir() if not path.name.isdigit()} == {
        *("recipe.json", "results.jsonl", "scores.json", "config.yaml")
    }


def test_results_have_genevals_keys_and_every_score(finished: Path) -> None:
    rows = lines(finished)
    assert [(row["prompt_index"], row["sample"]) for row in rows] == IMAGES
    for row in rows:
        spec = SPECS[row["prompt_index"]]
        assert json.loads(row["metadata"]) == spec  # a text, by which summary_scores.py groups
        assert (row["tag"], row["prompt"]) == (spec["tag"], spec["prompt"])
        assert row["filename"] == f"{row['prompt_index']:05d}/samples/{row['sample']:04d}.png"
        wanted, (seen,) = spec["include"][0]["class"], json.loads(row["details"])
        assert row["correct"] is (wanted == seen) and row["geneval/strict"] == float(row["correct"])
        assert row["reason"] == ("" if row["correct"] else f"expected at least 1 {wanted}, found 0")
        assert seen == ("circle" if row["bright"] * 255 < 153.5 else "square")
    assert {row["correct"] for row in rows} == {True, False}  # else this fixture would show nothing


def test_scores_are_means_over_tags_of_what_results_say(finished: Path) -> None:
    per_tag = defaultdict(list)
    for row in lines(finished):
        per_tag[row["tag"]].append(row["correct"])
    means = {tag: sum(own) / len(own) for tag, own in per_tag.items()}
    scores = json.loads((finished / "scores.json").read_text())
    assert scores.keys() == {"geneval/strict", "bright"}
    assert {tag: own["mean"] for tag, own in scores["geneval/strict"]["tags"].items()} == means
    overall = scores["geneval/strict"]["overall"]
    assert overall["mean"] == (means["a"] + means["b"]) / 2 and overall["prompts"] == 4
    assert overall["low"] <= overall["mean"] <= overall["high"]


def test_the_recipe_says_how_the_numbers_were_made(finished: Path, tiny_folder: Path, arguments: list[str]) -> None:
    recipe = json.loads((finished / "recipe.json").read_text())
    assert recipe["policy"] == {"model": str(tiny_folder), "sha256": policy_hash(tiny_folder)}
    assert recipe["sampling"] == {
        **{"seed": 0, "guidance": 2.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "dtype": "float32"}
    }
    assert (recipe["prompts"]["number"], recipe["samples_per_prompt"]) == (4, 2)
    geneval = recipe["evaluator"]["rewards"]["geneval/strict"]
    assert geneval["version"] == f"gcpo-t2i {recipe['evaluator']['version']}"
    assert geneval["detector"]["name"] == "Dark" and geneval["detector"]["version"].startswith("sha256:")


def test_the_table_shows_every_tag_and_the_overall_score(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--results", str(finished)]) == 0
    out = capsys.readouterr().out
    scores = json.loads((finished / "scores.json").read_text())
    for label, own in scores.items():
        for name, one in {label: own["overall"], **own["tags"]}.items():
            line = f"{one['mean']:.3f} │ {one['low']:.3f} to {one['high']:.3f} │"
            assert any(name in shown and line in shown for shown in out.splitlines())


# --- seeds and going on -------------------------------------------------------


def test_seeds_follow_from_the_place_alone(finished: Path) -> None:
    assert [row["seed"] for row in lines(finished)] == [image_seed(0, *place) for place in IMAGES]
    places = [(seed, *place) for seed in (0, 1) for place in IMAGES]
    assert len({image_seed(*place) for place in places}) == len(places)
    assert len(set(pictures(finished).values())) == len(IMAGES)  # equal prompts get different images, too


def test_batches_hold_every_image_once_in_order() -> None:
    assert batches(2, 3, 4) == [[(0, 0), (0, 1), (0, 2), (1, 0)], [(1, 1), (1, 2)]]


def test_going_on_keeps_what_is_there_and_gives_what_one_go_gives(copy: Path, finished: Path) -> None:
    for place in ("00000/samples/0001.png", "00003/samples/0000.png", "00003/samples/0001.png", "00003/grid.png"):
        (copy / place).unlink()
    (copy / "results.jsonl").unlink()
    kept = copy / "00000" / "samples" / "0000.png"
    Image.new("RGB", (16, 16)).save(kept)  # in a batch of which an image is missing, and still not made again
    before = kept.read_bytes()
    assert main(["eval", "--output_dir", str(copy), "--resume"]) == 0  # with the settings that it was begun with
    assert kept.read_bytes() == before
    own, whole = pictures(copy), pictures(finished)
    assert all(own[name] == whole[name] for name in whole if name != "00000/samples/0000.png")
    assert lines(copy)[1:] == lines(finished)[1:] and lines(copy)[0]["bright"] == 0
    assert (copy / "00003" / "grid.png").is_file()


def test_an_evaluation_does_not_go_on_with_another_recipe(copy: Path, arguments: list[str], error: Any) -> None:
    line = error([*arguments, "--output_dir", str(copy), "--resume", "--guidance", "3"])
    assert line == (
        f"{copy} was begun with another recipe: sampling.guidance: 3.0 here, 2.0 there; give the same settings, or "
        "--overwrite, or another --output_dir"
    )
    assert "begun with another recipe: evaluator.rewards" in error(
        ["eval", "--output_dir", str(copy), "--resume", "--rewards", '[{"name": "clip"}]']
    )


def test_a_reward_may_be_mended_before_there_are_scores(copy: Path, reward_file: Path, arguments: list[str]) -> None:
    (copy / "results.jsonl").unlink()
    mended = json.dumps([{"name": f"{reward_file}:constant"}])
    assert main(["eval", "--output_dir", str(copy), "--resume", "--rewards", mended]) == 0
    assert {row["constant"] for row in lines(copy)} == {1.0}
    assert list(json.loads((copy / "recipe.json").read_text())["evaluator"]["rewards"]) == ["constant"]


def test_nothing_is_replaced_unasked(copy: Path, arguments: list[str], tmp_path: Path, error: Any) -> None:
    assert "already holds files; add --resume" in error([*arguments, "--output_dir", str(copy)])
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("x")
    line = error([*arguments, "--output_dir", str(mine), "--overwrite"])
    assert line.endswith("holds files that no evaluation wrote; --overwrite only replaces evaluations")
    assert main([*arguments, "--output_dir", str(copy), "--overwrite", "--seed", "1"]) == 0
    assert [row["seed"] for row in lines(copy)] == [image_seed(1, *place) for place in IMAGES]


def test_what_a_reward_cannot_judge_is_refused_before_sampling(
    arguments: list[str], tmp_path: Path, error: Any
) -> None:
    prompts = tmp_path / "cats.jsonl"
    prompts.write_text(json.dumps({"tag": "a", "include": [{"class": "cat", "count": 1}], "prompt": "a cat"}))
    line = error([*arguments, "--prompts", str(prompts), "--output_dir", str(tmp_path / "out")])
    assert "reward 'geneval': the detector knows no class 'cat'" in line
    assert not (tmp_path / "out").exists()


def test_prompts_per_tag_is_a_fixed_choice_in_the_order_of_the_file(arguments: list[str], tmp_path: Path) -> None:
    kept = []
    for seed in ("0", "1"):
        folder = tmp_path / seed
        assert main([*arguments, "--output_dir", str(folder), "--prompts_per_tag", "1", "--seed", seed]) == 0
        kept.append([row["prompt"] for row in lines(folder)])
    assert kept[0] == kept[1] and [row["tag"] for row in lines(tmp_path / "1")] == ["a", "a", "b", "b"]


# --- comparing ----------------------------------------------------------------


@pytest.fixture(scope="module")
def other_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny import tiny_policy

    folder = tmp_path_factory.mktemp("other") / "policy"
    tiny_policy(seed=1).save_pretrained(folder)
    return folder


def test_two_policies_are_compared_image_by_image(
    arguments: list[str], finished: Path, other_policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new"
    command = [*arguments, "--model", str(other_policy), "--output_dir", str(folder)]
    assert main([*command, "--against", str(finished)]) == 0
    found = json.loads((folder / "comparison.json").read_text())["changes"]["bright"]
    pairs = list(zip(lines(folder), lines(finished), strict=True))
    assert all(mine["seed"] == theirs["seed"] for mine, theirs in pairs)
    apart = [mine["bright"] - theirs["bright"] for mine, theirs in pairs]  # four images of each tag
    assert found["difference"]["overall"]["mean"] == pytest.approx(sum(apart) / 8)
    by_prompt = [apart[i] + apart[i + 1] for i in range(0, 8, 2)]
    assert found["better"]["overall"] == sum(change > 0 for change in by_prompt) / 4
    assert "change" in capsys.readouterr().out
    before = {path: path.read_bytes() for path in folder.rglob("*.json*")}
    assert main(["eval", "--results", str(folder), "--against", str(finished)]) == 0  # both finished: no model needed
    assert {path: path.read_bytes() for path in folder.rglob("*.json*")} == before


def test_an_evaluation_equals_itself(finished: Path, copy: Path) -> None:
    assert main(["eval", "--results", str(copy), "--against", str(finished)]) == 0
    for change in json.loads((copy / "comparison.json").read_text())["changes"].values():
        assert set(change["difference"]["overall"].values()) == {0.0, 4}
        assert change["better"]["overall"] == change["worse"]["overall"] == 0


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (["--guidance", "3"], "sampling.guidance: 3.0 here, 2.0 there"),
        (["--seed", "4", "--top_k", "5"], "sampling.seed: 4 here, 0 there; sampling.top_k: 5 here, 0 there"),
        (["--samples_per_prompt", "1"], "samples_per_prompt: 1 here, 2 there"),
        (["--prompts_per_tag", "1"], "prompts.number: 2 here, 4 there; prompts.sha256: "),
        (["--rewards", '[{"name": "clip"}]'], "evaluator.rewards.clip.name: clip here, not set there"),
    ],
)
def test_other_recipes_are_refused_before_sampling(
    arguments: list[str], finished: Path, tmp_path: Path, error: Any, changed: list[str], named: str
) -> None:
    command = [*arguments, *changed, "--output_dir", str(tmp_path / "new"), "--against", str(finished)]
    line = error(command)
    assert line.startswith(f"{finished} has another recipe, so the scores cannot be compared: ") and named in line
    assert not (tmp_path / "new").exists()


def test_an_edited_detector_is_another_recipe(arguments: list[str], finished: Path, tmp_path: Path, error: Any) -> None:
    (tmp_path / "detector.py").write_text(DETECTOR.replace("LEVEL", "121"))
    recipe = json.loads((finished / "recipe.json").read_text())
    old = recipe["evaluator"]["rewards"]["geneval/strict"]["settings"]["detector"]
    rewards = arguments[-1].replace(old, f"{tmp_path / 'detector.py'}:Dark")
    command = [*arguments[:-1], rewards, "--output_dir", str(tmp_path / "new"), "--against", str(finished)]
    assert "geneval/strict.detector.version: sha256:" in error(command)


def test_the_ground_of_a_comparison_is_not_overwritten(arguments: list[str], copy: Path, error: Any) -> None:
    line = error([*arguments, "--output_dir", str(copy), "--overwrite", "--against", str(copy)])
    assert line == f"output_dir '{copy}' is or holds the folder of --against; name another folder"


def test_differences_name_what_is_not_ignored() -> None:
    ours = {"policy": {"sha256": "a"}, "x": {"y": 1, "z": {}}, "policyish": 1}
    theirs = {"policy": {"images": "b"}, "x": {"y": 2}, "policyish": 1}
    assert differences(ours, theirs, ["policy", "x.z"]) == ["x.y: 1 here, 2 there"]
    assert differences(ours, theirs, ["policy", "x.y"]) == ["x.z: {} here, not set there"]


def test_the_hash_is_of_weights_and_configs_wherever_they_lie(tiny_folder: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(tiny_folder, tmp_path / "moved"))
    (moved / "README.md").write_text("a card")
    (moved / "scores.json").write_text("{}")
    assert policy_hash(moved) == policy_hash(tiny_folder)
    weights = moved / "trunk" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert policy_hash(moved) != policy_hash(tiny_folder)
    weights.write_bytes(content)
    config = moved / "trunk" / "config.json"
    config.write_text(config.read_text() + " ")
    assert policy_hash(moved) != policy_hash(tiny_folder)


# --- images of others ---------------------------------------------------------


@pytest.fixture
def theirs(finished: Path, tmp_path: Path) -> Path:
    """The images alone, with the names that GenEval's own script gives them."""
    folder = tmp_path / "theirs"
    for path in finished.glob("[0-9]*"):
        shutil.copytree(path, folder / path.name)
        for image in (folder / path.name / "samples").iterdir():
            image.rename(image.with_name(f"0{image.name}"))
        (folder / path.name / "grid.png").unlink()
    return folder


def test_images_of_others_get_the_scores_that_ours_would_get(
    arguments: list[str], theirs: Path, finished: Path, copy: Path, tmp_path: Path
) -> None:
    before = sorted(theirs.rglob("*"))
    folder = tmp_path / "scored"
    command = [*external(arguments), "--images", str(theirs), "--output_dir", str(folder)]
    assert main([*command, "--against", str(finished)]) == 0
    assert sorted(theirs.rglob("*")) == before  # nothing is written there
    own, ours = lines(folder), lines(finished)
    for key in ("correct", "reason", "bright", "prompt", "tag"):
        assert [row[key] for row in own] == [row[key] for row in ours]
    assert {row["seed"] for row in own} == {None}
    assert own[0]["filename"] == "00000/samples/00000.png"
    recipe = json.loads((folder / "recipe.json").read_text())
    assert recipe["policy"] == {"images": str(theirs), "external": True} and recipe["sampling"] is None
    assert yaml.safe_load((folder / "config.yaml").read_text())["images"] == str(theirs)
    assert main(["eval", "--results", str(copy), "--against", str(folder)]) == 0


def damage(folder: Path, what: str) -> None:
    first, last = folder / "00000", folder / "00003"
    match what:
        case "metadata":
            (last / "metadata.jsonl").unlink()
        case "two prompts":
            (last / "metadata.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
        case "image":
            (last / "samples" / "00001.png").unlink()
        case "more":
            shutil.copy(last / "samples" / "00001.png", last / "samples" / "00002.png")
        case "unreadable":
            (last / "samples" / "00001.png").write_bytes(b"not a picture")
        case "half":
            content = (last / "samples" / "00001.png").read_bytes()
            (last / "samples" / "00001.png").write_bytes(content[: len(content) // 2])
        case "prompt":
            shutil.rmtree(folder / "00001")
        case "no images":
            shutil.rmtree(first / "samples")
        case "nothing":
            for path in folder.iterdir():
                shutil.rmtree(path)
        case "folder":
            shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("metadata", "prompt file '{}/00003/metadata.jsonl' does not exist"),
        ("two prompts", "{}/00003/metadata.jsonl: 2 lines; expected the one prompt of this folder"),
        ("image", "{}/00003/samples: image 0001.png is missing; every prompt needs the same number of images"),
        ("more", "{}/00003/samples: image 0002.png is one more than folder 00000 has"),
        ("unreadable", "{}/00003/samples/00001.png: not an image that can be read"),
        ("half", "{}/00003/samples/00001.png: not an image that can be read"),
        ("prompt", "{}: folder 00001 is missing or there twice, before 00002"),
        ("no images", "{}/00000/samples: no images in it; expected 00000/metadata.jsonl and 00000/samples/0000.png"),
        ("nothing", "{}: no folders 00000, 00001, … in it"),
        ("folder", "no folder of images at {}"),
    ],
)
def test_damaged_folders_of_images(
    arguments: list[str], theirs: Path, tmp_path: Path, error: Any, what: str, message: str
) -> None:
    damage(theirs, what)
    line = error([*external(arguments), "--images", str(theirs), "--output_dir", str(tmp_path / "out")])
    assert line.startswith(message.format(theirs))


def test_images_of_other_prompts_are_told_apart(arguments: list[str], theirs: Path, tmp_path: Path, error: Any) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(spec) + "\n" for spec in [SPECS[0], SPECS[2], *SPECS[2:]]))
    line = error([*external(arguments), "--images", str(theirs), "--prompts", str(prompts)])
    assert line == (
        f"{theirs}/00001/metadata.jsonl has the prompt 'a photo of a square', prompt 1 of {prompts} is "
        "'a photo of a red circle'"
    )
    prompts.write_text("".join(json.dumps(spec) + "\n" for spec in SPECS[:3]))
    line = error([*external(arguments), "--images", str(theirs), "--prompts", str(prompts)])
    assert line == f"{theirs} holds 4 prompts, {prompts} has 3"


def test_results_never_land_in_the_folder_of_images(arguments: list[str], theirs: Path, error: Any) -> None:
    for folder in (theirs, theirs.parent):
        line = error([*external(arguments), "--images", str(theirs), "--output_dir", str(folder), "--overwrite"])
        assert line == f"output_dir '{folder}' is or holds the folder of --images; name another folder"


# --- damaged results ----------------------------------------------------------


def rewrite(folder: Path, number: int, **changed: Any) -> None:
    rows = lines(folder)
    rows[number - 1] |= changed
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_damaged_line_is_named(copy: Path, error: Any) -> None:
    own = (copy / "results.jsonl").read_text().splitlines()
    (copy / "results.jsonl").write_text("\n".join([*own[:2], own[2][:40], *own[3:]]))
    assert error(["eval", "--results", str(copy)]).startswith(f"{copy}/results.jsonl, line 3: damaged, not JSON")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bright": "much"}, "results.jsonl, line 3: 'bright' must be a number or null, not 'much'"),
        ({"bright": float("nan")}, "results.jsonl, line 3: 'bright' must be a number or null, not nan"),
        ({"sample": "0"}, "results.jsonl, line 3: 'sample' must be a whole number from 0 on, not '0'"),
        ({"prompt": None}, "results.jsonl, line 3: 'prompt' must be a text, not None"),
        ({"seed": 7}, "results.jsonl and the recipe.json beside it are of two evaluations (line 3 has another seed)"),
    ],
)
def test_what_cannot_be_a_result_is_named(copy: Path, error: Any, changed: dict[str, Any], message: str) -> None:
    rewrite(copy, 3, **changed)
    assert error(["eval", "--results", str(copy)]).startswith(f"{copy}/{message}")


def test_results_of_another_recipe_are_refused(copy: Path, arguments: list[str], tmp_path: Path, error: Any) -> None:
    own = (copy / "results.jsonl").read_text()
    (copy / "results.jsonl").write_text("".join(line + "\n" for line in own.splitlines()[:6]))
    assert "are of two evaluations (6 lines, expected 8)" in error(["eval", "--results", str(copy)])
    (copy / "results.jsonl").write_text(own.replace("a photo of a circle", "a photo of a blue circle"))
    assert "are of two evaluations (other prompts)" in error(["eval", "--results", str(copy)])
    (copy / "results.jsonl").write_text(own.replace('"bright"', '"dark"'))
    assert "line 1: no 'bright'; this line was not written with the recipe" in error(["eval", "--results", str(copy)])


def test_folders_that_hold_no_finished_evaluation(copy: Path, tmp_path: Path, error: Any) -> None:
    assert error(["eval", "--against", "none"]) == "no evaluation at none: there is no such folder"
    assert "it holds no recipe.json" in error(["eval", "--results", str(tmp_path)])
    (copy / "results.jsonl").unlink()
    assert "was interrupted, it has no results.jsonl" in error(["eval", "--against", str(copy)])
    recipe = json.loads((copy / "recipe.json").read_text())
    (copy / "recipe.json").write_text(json.dumps(recipe | {"format": 9}))
    assert "another gcpo-t2i (format 9, known: 1)" in error(["eval", "--against", str(copy)])
    (copy / "recipe.json").write_text('{"format": 1}')
    assert "not a recipe of gcpo-t2i eval" in error(["eval", "--against", str(copy)])
    (copy / "recipe.json").write_text("{")
    assert "recipe.json: damaged" in error(["eval", "--against", str(copy)])


def test_an_interrupted_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), whole_file(path) as partial:
        partial.write_text("ne")
        raise RuntimeError
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("scores.json", "old")]
    with whole_file(path) as partial:
        partial.write_text("new")
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("scores.json", "new")]


# --- settings -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--results x --guidance 3", "--guidance does not go with --results"),
        ("--results x --images y", "--images does not go with --results"),
        ("--results x --overwrite", "--overwrite does not go with --results"),
        ("--images x --samples_per_prompt 2", "--samples_per_prompt does not go with --images"),
        ("--images x --model y", "--model does not go with --images"),
        ("--resume", "resume which run? Name its folder with --output_dir"),
        ("--rewards []", "rewards: at least one is needed"),
        ('--rewards [{"name":"clip"},{"name":"clip"}]', "rewards: 'clip' is there twice"),
        ("--samples_per_prompt 0", "samples_per_prompt must be > 0, not 0"),
        ("--model nowhere --output_dir x", "no model folder at nowhere"),
    ],
)
def test_settings_that_do_not_go_together(error: Any, line: str, message: str) -> None:
    assert error(["eval", *line.split()]).startswith(message)
