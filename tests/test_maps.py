"""Credit maps: the same from sampling and from scoring, numbers and pixels by hand, bad pictures, and the command."""

from __future__ import annotations

import json
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gcpo_t2i.algo.credit import CreditSettings, guidance_credit
from gcpo_t2i.cli import main
from gcpo_t2i.config import RewardConfig, TrainConfig
from gcpo_t2i.data import Prompt, described
from gcpo_t2i.errors import UserError
from gcpo_t2i.images import sample_grid
from gcpo_t2i.maps import remarks
from gcpo_t2i.maps.arrays import write_arrays
from gcpo_t2i.maps.draw import Scale, advantage_scale, color_table, credit_scale, overlay
from gcpo_t2i.maps.pictures import Picture, fit, image_size, read_picture
from gcpo_t2i.maps.scored import ScoredImages, contrasted, explain_images, phrase_maps, sample_images, without
from gcpo_t2i.maps.training import grid_with_maps
from gcpo_t2i.models.llamagen import LlamaGenPolicy
from gcpo_t2i.models.policy import Condition, Rollout
from gcpo_t2i.parsing import parse
from gcpo_t2i.rollout import Batch, Sampling
from gcpo_t2i.scoring import RewardSet
from gcpo_t2i.shapes.prompts import all_specs, parse_prompt
from gcpo_t2i.train import Trainer
from tests.tiny import tiny_policy, train_command

PROMPT = Prompt("two red circle and a blue square")
K3 = CreditSettings()


@pytest.fixture(scope="module")
def policy() -> LlamaGenPolicy:
    return tiny_policy()


@pytest.fixture(scope="module")
def rewards(reward_file: Path) -> RewardSet:
    return RewardSet.load([RewardConfig(f"{reward_file}:bright")])


def draw(
    policy: LlamaGenPolicy, rewards: RewardSet, prompt: Prompt = PROMPT, guidance: float = 3.0, group: int = 4
) -> ScoredImages:
    return sample_images(policy, prompt, rewards, Sampling(group, guidance, 0.8), torch.Generator().manual_seed(1))


def by_hand(rewards: list[float], cond: list[list[float]], null: list[list[float]]) -> ScoredImages:
    """Images of 2 × 1 codes with these log-probs."""
    named = {"cond_logp": torch.tensor(cond), "null_logp": torch.tensor(null)}
    images = [Image.new("RGB", (4, 2), (40 * i, 0, 0)) for i in range(len(rewards))]
    return ScoredImages(
        prompt=Prompt("a red circle"),
        grid=(1, 2),
        tokens=torch.zeros(len(rewards), 2, dtype=torch.long),
        tensors={**named, **dict.fromkeys(("exact_kl", "js", "entropy"), named["cond_logp"].abs())},
        images=images,
        scores={"r": list(rewards)},
        verdicts=[None] * len(rewards),
        rewards=torch.tensor(rewards),
        sampling=Sampling(len(rewards)),
    )


# --- scored images ------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_maps_of_a_sampled_group_equal_those_of_its_codes_scored_again(policy, rewards, guidance) -> None:
    scored = draw(policy, rewards, guidance=guidance)
    again = contrasted(policy, scored, None)
    assert scored.tensors.keys() == {"cond_logp", "null_logp", "exact_kl", "js", "entropy"}
    for name, tensor in scored.tensors.items():
        assert tensor.shape == (4, 16) and torch.allclose(tensor, again.tensors[name], atol=1e-5)
    for contrast in ("k3", "exact_kl", "abs", "log_ratio", "js"):
        settings = CreditSettings(contrast=contrast, normalizer="softmax")
        assert torch.allclose(scored.credit(settings), again.credit(settings), atol=1e-3)


def test_the_images_are_those_of_plain_sampling(policy, rewards) -> None:
    scored = draw(policy, rewards)
    cond = policy.condition([PROMPT.text])
    null = policy.condition([None], like=cond)
    rollout = policy.sample(
        cond, null, group=4, guidance=3.0, temperature=0.8, generator=torch.Generator().manual_seed(1)
    )
    assert torch.equal(scored.tokens, rollout.tokens)
    assert torch.equal(scored.tensors["null_logp"], rollout.null_logp)
    assert torch.equal(scored.credit(K3), guidance_credit(scored.tensors, scored.tokens >= 0, K3, []))


def test_given_pictures_are_explained_as_if_the_policy_had_drawn_their_codes(policy, rewards) -> None:
    pictures = draw(policy, rewards).images
    scored = explain_images(policy, PROMPT, rewards, pictures, temperature=0.8)
    assert torch.equal(scored.tokens, policy.encode(pictures))
    cond = policy.condition([PROMPT.text] * 4)
    assert torch.allclose(
        scored.tensors["cond_logp"], policy.logp(cond, scored.tokens, temperature=0.8).logp, atol=1e-5
    )
    assert scored.pictures == pictures and scored.images != pictures
    assert scored.scores["bright"] == rewards.score(pictures, [PROMPT] * 4)["bright"]


def test_credit_and_advantage_by_hand() -> None:
    scored = by_hand([1.0, 3.0], cond=[[-1.0, -2.0], [-1.0, -1.0]], null=[[-2.0, -5.0], [-3.0, -1.0]])
    # |log-ratio| is 1 and 3, then 2 and 0; over its mean 0.5 and 1.5, then 2 and 0
    settings = CreditSettings(contrast="abs", normalizer="mean")
    assert scored.credit(settings).tolist() == [[0.5, 1.5], [2.0, 0.0]]
    # rewards 1 and 3: mean 2, standard deviation √2
    half = 1 / (2**0.5 + 1e-4)
    assert scored.advantage.tolist() == pytest.approx([-half, half])
    expected = [-0.5 * half, -1.5 * half, 2 * half, 0.0]
    assert scored.advantage_map(settings).flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("rewards", "reason"),
    [
        ([2.0], "one image has no group to be compared with"),
        ([2.0, 2.0], "all images of the group have the same reward"),
    ],
)
def test_without_a_comparison_there_is_no_advantage(rewards, reason) -> None:
    scored = by_hand(rewards, [[-1.0, -2.0]] * len(rewards), [[-2.0, -5.0]] * len(rewards))
    assert scored.no_advantage == reason and not scored.advantage_map(K3).any()
    assert remarks.of_group(scored) == [f"no advantage map: {reason}"]


def test_a_reward_that_cannot_judge_the_prompt_is_named(policy, rewards) -> None:
    geneval = RewardSet.load([RewardConfig("geneval")])
    scored = draw(policy, geneval)
    assert remarks.of_group(scored) == ["no advantage map: 'geneval' cannot judge this prompt"]
    both = RewardSet({**geneval.rewards, **rewards.rewards}, {**geneval.weights, **rewards.weights})
    scored = draw(policy, both)
    assert remarks.of_group(scored) == ["geneval: cannot judge this prompt, and does not count"]
    assert scored.no_advantage is None


def test_the_negative_prompt_moves_the_map_and_the_prompt_itself_leaves_no_evidence(policy, rewards) -> None:
    scored = draw(policy, rewards)
    other = contrasted(policy, scored, "blue square")
    assert torch.equal(other.tokens, scored.tokens) and torch.equal(other.rewards, scored.rewards)
    assert not torch.allclose(other.credit(K3), scored.credit(K3))
    for negative in (PROMPT.text, f"  {PROMPT.text}"):  # the same to the tokenizer
        same = contrasted(policy, scored, negative)
        assert same.unmoved.all() and torch.allclose(same.credit(K3), torch.ones(4, 16))
        assert "no credit map" in remarks.of_group(same)[0]
    assert not scored.unmoved.any()


def test_phrases_are_contrasted_with_the_prompt_without_them(policy, rewards) -> None:
    scored = draw(policy, rewards)
    maps = phrase_maps(policy, scored, ["red circle", "two"])
    assert maps["red circle"].prompt.negative == "two and a blue square"
    expected = contrasted(policy, scored, "red circle and a blue square")
    assert torch.equal(maps["two"].credit(K3), expected.credit(K3))


@pytest.mark.parametrize(
    ("phrase", "left"),
    [
        ("red", "a circle and a square, a redder one"),
        ("a Red  circle and", "a red square, a redder one"),
        ("red circle", "a red square, a redder one"),
        ("red square, a redder one", "a red circle"),
        ("square,", "a red circle and a red a redder one"),
        ("one", "a red circle and a red square, a redder"),
        ("a red circle and a red square, a redder one", None),
    ],
)
def test_prompts_without_a_phrase(phrase: str, left: str | None) -> None:
    assert without("a red circle and a  red square, a redder one", phrase) == left


def test_what_cannot_stand_alone_goes_with_a_phrase() -> None:
    text = "a photo of an orange circle and a blue square"
    assert without(text, "orange") == "a photo of a circle and a blue square"
    assert without(text, "orange circle") == "a photo of a blue square"
    assert without(text, "blue square") == "a photo of an orange circle"
    assert without("The red apple", "red") == "The apple" and without("A red apple", "red") == "An apple"


@pytest.mark.parametrize("phrase", ["green", "circ", "circle red", " ", "red circle)"])
def test_a_phrase_that_is_not_in_the_prompt(phrase: str) -> None:
    with pytest.raises(UserError, match=r"is not in the prompt 'a red circle'"):
        without("a red circle", phrase)


# --- prompts ------------------------------------------------------------------


def test_the_metadata_of_every_prompt_of_shapesworld_follows_from_its_words() -> None:
    for spec in all_specs():
        expected = {key: value for key, value in spec.items() if key != "prompt"}
        assert parse_prompt(spec["prompt"]) == expected
        assert described(f" {spec['prompt'].removeprefix('a photo of ').capitalize()}.").columns == expected


@pytest.mark.parametrize("text", ["a cat", "two circle", "a circles", "a red", "a circle and a red circle", "red"])
def test_other_prompts_have_no_metadata(text: str) -> None:
    assert described(text) == Prompt(text)


def test_metadata_of_prompts_that_shapesworld_has_not() -> None:
    assert parse_prompt("two red circles above a blue square") == {
        "tag": "position",
        "include": [
            {"class": "square", "count": 1, "color": "blue"},
            {"class": "circle", "count": 2, "color": "red", "position": ["above", 0]},
        ],
        "exclude": [{"class": "circle", "count": 3}],
    }


@pytest.mark.parametrize(("text", "message"), [(" ", "the prompt is empty"), ("a" * 10_001, "10,001 characters")])
def test_prompts_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        described(text)
    with pytest.raises(UserError, match="a negative prompt of 10,001 characters"):
        described("a", "b" * 10_001)


def test_what_the_model_does_not_read_is_said(policy) -> None:
    assert remarks.of_prompt(policy, PROMPT) == []
    cat, long = remarks.of_prompt(policy, Prompt("a cat, a cat of кот", "a a a a a a a red square"))
    assert cat.endswith("of the prompt, to it they are all the same: 'cat', ',', 'кот'")
    # 8 tokens are read
    assert "the negative prompt is too long" in long and "last 6 characters, from 'square'" in long
    (many,) = remarks.of_prompt(policy, Prompt("b c d e f g h i"))
    assert many.endswith("'b', 'c', 'd', 'e', 'f', 'g', 'h', 'i'")


# --- pictures -----------------------------------------------------------------


def saved(image: Image.Image, kind: str = "PNG") -> BytesIO:
    file = BytesIO()
    image.save(file, kind)
    file.seek(0)
    return file


def test_transparent_parts_are_put_on_white() -> None:
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    assert read_picture(saved(image)) == Picture(image.convert("RGB"))
    image.putpixel((1, 0), (0, 0, 100, 51))  # a fifth of (0, 0, 100) and four of white
    picture = read_picture(saved(image))
    assert [picture.image.getpixel((x, 0)) for x in (0, 1)] == [(200, 0, 0), (204, 204, 224)]
    assert picture.notes == ("transparent parts were put on white",)


def header_only(width: int, height: int) -> bytes:
    """A PNG that claims its size and holds no pixel."""
    chunks = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b"")
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a picture", "cannot be read as a picture"),
        (b"", "cannot be read as a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be read as a picture"),
        (saved(Image.effect_noise((64, 64), 50)).getvalue()[:-400], "cannot be read as a picture"),
        (header_only(20_000, 20_000), "at most 32 million pixels are decoded"),
        (header_only(8_000, 4_001), "has 8000 × 4001 pixels"),
        (saved(Image.new("I;16", (4, 4))).getvalue(), "more than 8 bits per channel"),
    ],
    ids=["text", "empty", "postscript", "truncated", "bomb", "large", "deep"],
)
def test_files_that_are_no_picture_for_us(content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_picture(BytesIO(content))


def test_pictures_are_fitted_to_the_policy(policy) -> None:
    assert image_size(policy) == (16, 16)
    small = Picture(Image.effect_noise((16, 16), 80).convert("RGB"))
    assert fit(small, policy) is small
    large = fit(Picture(small.image.resize((48, 48), Image.Resampling.NEAREST)), policy)
    assert large.image.tobytes() == small.image.tobytes()
    assert large.notes == ("the model sees it in 16 × 16 pixels",)
    wide = Image.new("RGB", (64, 16))
    wide.paste(small.image, (24, 0))
    middle = fit(Picture(wide), policy)
    assert middle.image.tobytes() == small.image.tobytes() and "were cut to a middle part" in middle.notes[0]


# --- drawing ------------------------------------------------------------------


def test_an_overlay_by_hand() -> None:
    image = Image.new("RGB", (2, 1), (100, 100, 100))
    scale = Scale("credit", 2.0, "inferno")
    drawn = np.asarray(overlay(image, np.array([[0.0, 2.0]]), scale, opacity=1.0, least=3))
    assert drawn.shape == (3, 6, 3)  # enlarged by 3
    assert (drawn[:, :3] == 45).all()  # no weight: grey stays grey, and 0.55 of it goes to black
    assert (drawn[:, 3:] == np.rint(color_table("inferno")[255])).all()
    half = np.asarray(overlay(image, np.array([[1.0, 4.0]]), scale, opacity=0.5, least=1))[0]
    backdrop = 100 - 0.5 * 0.55 * 100  # weights ½ and 1 (beyond the scale), so alpha ¼ and ½
    assert half[0] == pytest.approx(np.rint(backdrop + 0.25 * (color_table("inferno")[128] - backdrop)))
    assert half[1] == pytest.approx(np.rint(backdrop + 0.5 * (color_table("inferno")[255] - backdrop)))


def test_opacity_zero_is_the_image() -> None:
    image = Image.effect_noise((8, 8), 80).convert("RGB")
    scale = Scale("credit", 1.0, "inferno")
    assert overlay(image, np.ones((4, 4)), scale, opacity=0.0, least=1).tobytes() == image.tobytes()


def test_advantage_is_green_above_zero_and_purple_below_with_symmetric_limits() -> None:
    maps = torch.tensor([[1.0, -2.0, 0.0, 0.5]])
    scale = advantage_scale(maps)
    assert scale.low == -scale.high and scale.high == pytest.approx(1.97)  # 99 % of the way from 1 to 2 for 4 values
    drawn = np.asarray(overlay(Image.new("RGB", (4, 1), "white"), maps, scale, least=1))[0].astype(int)
    red, green, blue = drawn.T
    assert green[0] > max(red[0], blue[0]) and green[1] < min(red[1], blue[1])
    assert drawn[2].tolist() == [255, 255, 255]


def test_scales_say_what_they_measure() -> None:
    credit = torch.tensor([[0.5, 1.5]])
    assert credit_scale(credit, K3).label == "credit (mean 1)"
    assert credit_scale(credit, CreditSettings("js", "none")).label == "js, nats"
    assert credit_scale(torch.zeros(1, 2), CreditSettings("js", "none")).high == 1.0  # nothing to divide by


# --- numbers ------------------------------------------------------------------


def test_arrays_are_read_as_they_were(policy, rewards, tmp_path: Path) -> None:
    scored = draw(policy, rewards)
    phrases = phrase_maps(policy, scored, ["red", "two"])
    write_arrays(tmp_path, scored, K3, phrases, model="tiny", seed=1)
    with np.load(tmp_path / "arrays.npz", allow_pickle=False) as arrays:
        found = dict(arrays)
    assert np.array_equal(found["tokens"], scored.tokens)
    for name, tensor in scored.tensors.items():
        assert np.array_equal(found[name], tensor)
    assert np.array_equal(found["advantage_map"], found["credit"] * found["advantage"][:, None])
    assert found["phrase_credit"].shape == (2, 4, 16)
    assert np.array_equal(found["phrase_credit"][1], phrases["two"].credit(CreditSettings(normalizer="mean")))
    about = json.loads((tmp_path / "arrays.json").read_text())
    assert (about["model"], about["seed"], about["grid"]) == ("tiny", 1, [4, 4])
    assert about["sampling"] == {"group": 4, "guidance": 3.0, "temperature": 0.8, "top_k": 0, "top_p": 1.0}
    assert about["credit"]["contrast"] == "k3" and about["rewards"] == pytest.approx(found["rewards"].tolist())
    assert about["phrases"][0] == {"phrase": "red", "negative": "two circle and a blue square"}


# --- training -----------------------------------------------------------------


def test_the_grid_of_a_step_has_the_maps_beside_the_samples() -> None:
    grey, rewards = (100, 100, 100), torch.tensor([[0.0, 1.0], [3.0, 2.0]])
    rollout = Rollout(torch.zeros(4, 2, dtype=torch.long), torch.zeros(4, 2), None, torch.zeros(4, 2))
    images = [Image.new("RGB", (2, 1), grey)] * 4
    condition = Condition(torch.zeros(2, 1, 1), torch.ones(2, 1, dtype=torch.bool))
    batch = Batch([Prompt("a"), Prompt("b")], condition, None, rollout, images, {"r": []}, rewards, {})
    maps = torch.tensor([[[-2.0, 0.0]], [[0.0, 2.0]], [[2.0, 0.0]], [[0.0, -2.0]]])  # (4, 1, 2)
    page = np.asarray(grid_with_maps(batch, maps, prompts=1))
    samples = np.asarray(sample_grid([("a", images[:2], [0.0, 1.0])]))
    assert (page[: samples.shape[0], : samples.shape[1]] == samples).all()
    beside = page[40, samples.shape[1] :].astype(int)  # a line of pixels through the two images of the first prompt
    red, green, blue = beside.T
    assert (green < np.minimum(red, blue) - 20).sum() == 96 and (green > np.maximum(red, blue) + 20).sum() == 96
    assert (green < np.minimum(red, blue) - 20).argmax() < (green > np.maximum(red, blue) + 20).argmax()
    both = np.asarray(grid_with_maps(batch, maps, prompts=2))
    assert both.shape[0] - page.shape[0] == samples.shape[0] - 4  # one row more, the padding on top stays


def test_the_maps_of_a_step_are_credit_times_advantage(tiny_folder: Path, reward_file: Path, tmp_path: Path) -> None:
    command = train_command(tiny_folder, reward_file, tmp_path)
    trainer = Trainer(parse(TrainConfig, [*command[1:], "--credit.contrast", "abs", "--credit.normalizer", "mean"]))
    _, batch, maps = trainer.step()
    gap = (batch.rollout.cond_logp - batch.rollout.null_logp).abs()
    credit = gap / gap.mean(1, keepdim=True)
    rewards = batch.rewards  # (2, 4), whose deviations are divided by the standard deviation of the whole step
    advantage = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std() + 1e-4)).flatten()
    assert maps.shape == (8, 4, 4)
    assert torch.allclose(maps.flatten(1), credit * advantage[:, None], atol=1e-5)


def test_a_run_and_its_tracker_get_samples_with_maps(tiny_folder: Path, reward_file: Path, tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    command = train_command(tiny_folder, reward_file, tmp_path)
    assert main([*command, "--log.report_to", "tensorboard", "--log.images_every", "2"]) == 0
    with Image.open(tmp_path / "run" / "samples" / "step-000002.png") as image:
        size = image.size
    assert size[0] > 8 * 96  # four samples and four maps of at least 96 px
    events = str(tmp_path / "run" / "gcpo-t2i")
    log = event_accumulator.EventAccumulator(events, size_guidance={"images": 0}).Reload()
    assert [event.step for event in log.Images("samples")] == [2, 3]
    assert (log.Images("samples")[0].width, log.Images("samples")[0].height) == size


# --- the command --------------------------------------------------------------


@pytest.fixture
def command(tiny_folder: Path, reward_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    rewards = json.dumps([{"name": f"{reward_file}:bright"}])
    common = ["--model", str(tiny_folder), "--prompt", "a red circle and two square", "--device", "cpu"]
    return ["heatmap", *common, "--rewards", rewards, "--out", "maps"]


def names(folder: str) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


def test_a_group_is_drawn_and_kept(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--num_images", "3", "--phrases", "red", "two square"]) == 0
    kinds = ("", "-credit", "-advantage", "-phrase-0", "-phrase-1")
    images = {f"image-{i}{kind}.png" for i in range(3) for kind in kinds}
    assert names("maps") == images | {"heatmap.png", "arrays.npz", "arrays.json"}
    with Image.open("maps/image-2.png") as image, Image.open("maps/image-2-credit.png") as credit:
        assert image.size == (16, 16) and credit.size == (384, 384)
    out = capsys.readouterr().out
    assert "advantage" in out and "results: maps" in out
    assert main(["sample", *command[1:5], "--num_images", "3", "--out", "plain", "--device", "cpu"]) == 0
    for i in range(3):
        assert Path(f"plain/00000-{i}.png").read_bytes() == Path(f"maps/image-{i}.png").read_bytes()


def test_settings_of_credit_reach_the_map(command: list[str]) -> None:
    options = ["--contrast", "abs", "--normalizer", "softmax", "--credit_temperature", "0.5", "--guidance", "1"]
    assert main([*command, *options]) == 0
    with np.load("maps/arrays.npz") as arrays:
        score = np.exp(np.abs(arrays["cond_logp"] - arrays["null_logp"]) / 0.5)
        assert arrays["credit"] == pytest.approx(16 * score / score.sum(1, keepdims=True), rel=1e-3)


def test_a_given_picture_is_explained(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Image.effect_noise((32, 32), 90).save("given.png")
    assert main([*command, "--image", "given.png", "--phrases", "red"]) == 0
    pictures = {f"image-0{kind}.png" for kind in ("", "-codes", "-credit", "-phrase-0")}
    assert names("maps") == pictures | {"heatmap.png", "arrays.npz", "arrays.json"}
    about = json.loads(Path("maps/arrays.json").read_text())
    assert about["sampling"] is None and about["seed"] is None
    out = capsys.readouterr().out
    assert "given.png: the model sees it in 16 × 16 pixels" in out
    assert "no advantage map: one image has no group to be compared with" in out


def test_two_models_are_drawn_with_one_seed(command: list[str], tmp_path: Path) -> None:
    other = tiny_policy(seed=5)
    other.save_pretrained(tmp_path / "other")
    assert main([*command, "--compare", "other", "--num_images", "2"]) == 0
    assert names("maps") - names("maps/base") == {"base", "heatmap.png"}
    base, ours = (json.loads(Path(f"maps/{name}arrays.json").read_text()) for name in ("base/", ""))
    assert (base["model"], ours["model"]) == ("other", command[2])
    assert base["scales"] == ours["scales"]
    with np.load("maps/base/arrays.npz") as arrays:
        found = arrays["tokens"]
    cond = other.condition(["a red circle and two square"])
    null = other.condition([None], like=cond)
    drawn = other.sample(cond, null, group=2, guidance=2.0, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(found, drawn.tokens)


def test_the_prompt_against_itself_gives_no_map(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--negative", "a red circle and two square"]) == 0
    assert names("maps") == {f"image-{i}.png" for i in range(4)} | {"heatmap.png", "arrays.npz", "arrays.json"}
    assert "no credit map: the negative prompt is the prompt itself" in capsys.readouterr().out


def test_strange_prompts_are_drawn(command: list[str], capsys: pytest.CaptureFixture[str], recwarn) -> None:
    strange = "$x^ [bold] 猫 " + "red " * 2000
    assert main([*command, "--prompt", strange, "--num_images", "2"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "to it they are all the same: '$', 'x', '^', '[', 'bold', ']', '猫'" in out
    assert "does not read the last 7,99" in out and "[bold]" in out
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_nothing_is_overwritten_unless_told(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--num_images", "3"]) == 0
    before = Path("maps/arrays.json").read_bytes()
    assert main([*command, "--num_images", "2"]) == 2
    assert "already holds files; add --overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--rewards", "[{name: nowhere.py:x}]"]) == 2
    assert Path("maps/arrays.json").read_bytes() == before and "image-2.png" in names("maps")
    assert main([*command, "--num_images", "2", "--overwrite"]) == 0
    assert "image-1.png" in names("maps") and "image-2.png" not in names("maps")
    assert not [path for path in Path.cwd().iterdir() if path.name.startswith(".")]


BAD: dict[str, tuple[list[str], str]] = {
    "no prompt": (["--prompt", " "], "the prompt is empty"),
    "long prompt": (["--prompt", "a" * 10_001], "a prompt of 10,001 characters, starting with 'aaaa"),
    "phrase": (["--phrases", "green"], "phrase 'green' is not in the prompt 'a red circle and two square'"),
    "contrast": (["--contrast", "k4"], "contrast 'k4' is unknown; did you mean 'k3'?"),
    "signed": (["--contrast", "log_ratio", "--normalizer", "mean"], "would make negative weights"),
    "seed of a picture": (["--image", "x.png", "--seed", "3"], "--seed is for sampling, and --image"),
    "no rewards": (["--rewards", "[]"], "rewards: at least one is needed"),
    "no picture": (["--image", "x.png"], "image 'x.png' cannot be read as a picture (No such file"),
    "folder": (["--image", "."], "image '.' cannot be read as a picture (Is a directory)"),
    "model": (["--compare", "nowhere"], "no model folder at nowhere"),
    "thesis": (["--out", "mine", "--overwrite"], "output folder 'mine' holds files that no heatmap wrote"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name: str, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine").mkdir()
    Path("mine/thesis").touch()
    options, message = BAD[name]
    assert main([*command, *options]) == 2
    told = capsys.readouterr().err
    assert told.startswith("gcpo-t2i: error: ") and told.count("\n") == 1 and message in told
    assert names(".") == {"mine"} and names("mine") == {"thesis"}


def test_the_current_folder_is_not_replaced(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--out", "."]) == 2
    assert "output folder '.' is the current folder; name one in it" in capsys.readouterr().err
