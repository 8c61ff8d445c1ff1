"""Pre-training: the shared loop, the stages, and the command as a whole with a handful of steps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from gcpo_t2i.config import PretrainConfig, TrainConfig
from gcpo_t2i.cot.arithmetic import pretrain as reasoner
from gcpo_t2i.cot.arithmetic.corpus import Example
from gcpo_t2i.cot.arithmetic.tokenizer import build_tokenizer
from gcpo_t2i.cot.models import answer, load_text_model
from gcpo_t2i.errors import UserError
from gcpo_t2i.models import load_policy
from gcpo_t2i.models.llamagen import LlamaGenPolicy
from gcpo_t2i.shapes import TAGS, Object, Scene, heldout_specs, train_specs
from gcpo_t2i.shapes import pretrain as command
from gcpo_t2i.shapes.pretrain import aesthetic, clip, generator, vq
from gcpo_t2i.shapes.pretrain.cards import Measured, Sizes, machine, measure_vq, write_card
from gcpo_t2i.shapes.pretrain.fit import Metrics, Schedule, fit
from gcpo_t2i.shapes.pretrain.stream import SceneBatch, SceneStream
from gcpo_t2i.shapes.prompts import all_specs
from rewards.aesthetic import Aesthetic
from rewards.clip import Clip

CPU = torch.device("cpu")


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- the loop -------------------------------------------------------------------


def _toy(stop_at: int | None = None) -> tuple[nn.Module, Callable[[int], tuple[Tensor, Metrics]]]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def loss_at(step: int) -> tuple[Tensor, Metrics]:
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(8, 3, generator=_generator(step))
        loss = (module(x).squeeze(1) - x.sum(dim=1)).square().mean()
        return loss, {"loss": loss.item()}

    return module, loss_at


def test_stopping_and_going_on_changes_no_bit(tmp_path: Path) -> None:
    schedule = Schedule(7, 1e-2, warmup=2, save_every=3)
    whole, loss_at = _toy()
    expected = fit("toy", whole, loss_at, schedule, tmp_path / "whole.pt")

    stopped, loss_at = _toy(stop_at=5)  # the last state before is that of step 3
    with pytest.raises(KeyboardInterrupt):
        fit("toy", stopped, loss_at, schedule, tmp_path / "parts.pt")
    resumed, loss_at = _toy()
    for parameter in resumed.parameters():
        nn.init.zeros_(parameter)  # everything comes from the state
    fit("toy", resumed, loss_at, schedule, tmp_path / "parts.pt")

    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    states = [torch.load(tmp_path / name, weights_only=True) for name in ("whole.pt", "parts.pt")]
    moments = [[entry["exp_avg_sq"] for entry in state["optimizer"]["state"].values()] for state in states]
    assert all(torch.equal(a, b) for a, b in zip(*moments, strict=True))
    assert json.loads((tmp_path / "whole.jsonl").read_text()) == {"step": 7, **expected}


def test_a_finished_fit_does_nothing(tmp_path: Path) -> None:
    schedule = Schedule(2, 1e-2, warmup=1)
    module, loss_at = _toy()
    fit("toy", module, loss_at, schedule, tmp_path / "toy.pt")
    again, loss_at = _toy(stop_at=0)
    assert fit("toy", again, loss_at, schedule, tmp_path / "toy.pt") == {}
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))


def test_another_number_of_steps_is_refused_once_the_rate_falls(tmp_path: Path) -> None:
    module, loss_at = _toy()
    fit("toy", module, loss_at, Schedule(4, 1e-2, warmup=1), tmp_path / "toy.pt")
    with pytest.raises(UserError, match="started with 4 steps"):
        fit("toy", module, loss_at, Schedule(6, 1e-2, warmup=1), tmp_path / "toy.pt")


def test_a_loss_that_is_not_a_number_stops_the_stage(tmp_path: Path) -> None:
    module = nn.Linear(1, 1)

    def loss_at(step: int) -> tuple[Tensor, Metrics]:
        return module(torch.full((1, 1), float("nan"))).sum(), {}

    with pytest.raises(FloatingPointError, match="stage toy: the loss is nan at step 0"):
        fit("toy", module, loss_at, Schedule(4, 1e-2), tmp_path / "toy.pt")
    assert not (tmp_path / "toy.pt").exists()


def test_the_rate_rises_stays_and_falls() -> None:
    schedule = Schedule(100, 1.0, warmup=10, decay=0.5, floor=0.1)
    assert schedule.rate(0) == pytest.approx(0.1)
    assert schedule.rate(9) == schedule.rate(30) == schedule.rate(50) == 1.0
    # Half way down from step 50 to 100 the cosine is 0: 0.1 + 0.9 · 0.5.
    assert schedule.rate(75) == pytest.approx(0.55)
    assert schedule.rate(100) == pytest.approx(0.1)


# --- CLIP -----------------------------------------------------------------------


def _spec(prompt: str) -> dict:
    return next(spec for spec in all_specs() if spec["prompt"] == prompt)


def test_captions_that_say_the_same_have_one_meaning() -> None:
    left = clip.meaning(_spec("a photo of a star left of a heart"))
    assert left == clip.meaning(_spec("a photo of a heart right of a star"))
    assert left != clip.meaning(_spec("a photo of a star right of a heart"))
    assert left != clip.meaning(_spec("a photo of a star above a heart"))
    assert clip.meaning(_spec("a photo of a star above a heart")) == clip.meaning(
        _spec("a photo of a heart below a star")
    )
    swapped = _spec("a photo of a blue heart and a red star")
    assert clip.meaning(_spec("a photo of a red star and a blue heart")) == clip.meaning(swapped)


def test_distinct_keeps_the_first_of_each_meaning() -> None:
    prompts = ["a star and a ring", "a ring", "a ring and a star", "two rings", "a ring"]
    assert clip.distinct([_spec(f"a photo of {prompt}") for prompt in prompts]) == [0, 1, 3]


def test_blur_spreads_a_point_as_a_gaussian_does() -> None:
    image = torch.zeros(2, 1, 21, 21)
    image[:, 0, 10, 10] = 1.0
    blurred = clip.blur(image, torch.tensor([1.0, 0.0]))
    # Neighbouring weights of a Gaussian with sigma 1 differ by the factor exp(−1/2); 1/(2π) at the centre.
    assert blurred[0, 0, 10, 11] / blurred[0, 0, 10, 10] == pytest.approx(np.exp(-0.5), rel=1e-4)
    assert blurred[0, 0, 10, 10].item() == pytest.approx(1 / (2 * np.pi), rel=1e-3)
    assert blurred[0].sum().item() == pytest.approx(1.0, rel=1e-5)
    assert torch.equal(blurred[1], image[1])
    assert torch.allclose(clip.blur(torch.full((1, 3, 9, 9), 0.7), torch.tensor([2.0])), torch.tensor(0.7))


def test_softening_leaves_about_half_of_the_images_alone() -> None:
    images = SceneStream(train_specs(), 64, seed=0).batch(0).images
    soft = clip.soften(images, _generator())
    same = [torch.equal(a, b) for a, b in zip(images, soft, strict=True)]
    assert 16 <= sum(same) <= 48  # 64 · 0.5 ± four standard deviations
    assert soft.min() >= -1 and soft.max() <= 1
    assert (soft - images).abs().mean() < 0.05  # mild
    assert torch.equal(soft, clip.soften(images, _generator()))


@pytest.fixture(scope="module")
def trained_clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[open_clip.CLIP, Path]:
    folder = tmp_path_factory.mktemp("clip")
    model, metrics = clip.train_clip(SceneStream(train_specs(), 8, seed=300), 2, folder, 0, CPU, torch.float32)
    assert metrics["loss"] > 0 and 0 <= metrics["top-1"] <= 1
    torch.manual_seed(0)
    start = clip.build_clip().state_dict()
    assert not torch.equal(model.state_dict()["token_embedding.weight"], start["token_embedding.weight"])
    clip.save_clip(model, folder / "saved")
    return model, folder / "saved"


def test_open_clip_loads_the_saved_folder_with_the_same_features(trained_clip: tuple[open_clip.CLIP, Path]) -> None:
    model, folder = trained_clip
    loaded: Any
    preprocess: Any
    loaded, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    loaded.eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    batch = SceneStream(heldout_specs(), 3, seed=0).batch(0)
    prompts = [*batch.prompts, "A photo of a red circle", "two zebras"]
    assert torch.equal(tokenizer(prompts), clip.tokenize(prompts))
    picture = Image.fromarray(((batch.images[0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy())
    assert torch.allclose(preprocess(picture), batch.images[0], atol=1e-6)
    with torch.no_grad():
        assert torch.equal(loaded.encode_image(batch.images), model.encode_image(batch.images))
        assert torch.equal(loaded.encode_text(tokenizer(prompts)), model.encode_text(clip.tokenize(prompts)))
    assert sum(path.stat().st_size for path in folder.iterdir()) < 5 * 2**20


def test_captions_are_one_token_a_word_between_start_and_end() -> None:
    tokenizer = clip.build_tokenizer()
    ids = clip.tokenize(["A photo of a red zebra"])[0].tolist()
    words = tokenizer.convert_ids_to_tokens(ids)
    assert words == ["<bos>", "a", "photo", "of", "a", "red", "<unk>", "<eos>"] + ["<pad>"] * (clip.CONTEXT - 8)
    assert max(len(spec["prompt"].split()) for spec in all_specs()) + 2 <= clip.CONTEXT


class _Oracle(nn.Module):
    """Takes every image for that of its own caption, or every image for that of the next one."""

    def __init__(self, right: bool) -> None:
        super().__init__()
        self.right = right

    def encode_image(self, images: Tensor, normalize: bool) -> Tensor:
        return torch.eye(len(images)).roll(0 if self.right else 1, dims=1)

    def encode_text(self, ids: Tensor, normalize: bool) -> Tensor:
        return torch.eye(len(ids))


def test_retrieval_counts_own_captions_alone() -> None:
    assert set(clip.retrieval(_Oracle(True), heldout_specs(), 0, CPU, draws=2).values()) == {1.0}  # type: ignore[arg-type]
    assert set(clip.retrieval(_Oracle(False), heldout_specs(), 0, CPU, draws=2).values()) == {0.0}  # type: ignore[arg-type]


def test_balanced_retrieval_uses_up_the_small_tags() -> None:
    found = clip.retrieval(_Oracle(True), heldout_specs(), 0, CPU, dict.fromkeys(TAGS, 1.0), draws=1)  # type: ignore[arg-type]
    assert set(found) == {"overall", *TAGS}


# --- the aesthetic head ---------------------------------------------------------

CENTRED = Scene((Object("square", "blue", 16, 16, 16),))


def test_composition_by_hand() -> None:
    # In the middle, 16 px from every edge, of one hue.
    assert (aesthetic.balance(CENTRED), aesthetic.room(CENTRED), aesthetic.harmony(CENTRED)) == (1.0, 1.0, 1.0)
    # Luminance of (40, 80, 210) is 0.2126·40 + 0.7152·80 + 0.0722·210 = 80.882, of the background 240.
    assert aesthetic.contrast(CENTRED) == pytest.approx((240 - 80.882) / 255 / 0.7)
    assert aesthetic.composition(CENTRED) == pytest.approx(0.8 + 0.2 * (240 - 80.882) / 255 / 0.7)
    # Moved 9 px to the side: half of the 18 px at which balance is lost, and 7 px from the edge.
    moved = Scene((replace(CENTRED.objects[0], x=25),))
    assert aesthetic.balance(moved) == pytest.approx(0.5)
    assert aesthetic.room(moved) == pytest.approx(7 / 8)
    corner = Scene((replace(CENTRED.objects[0], x=0, y=0),))
    assert (aesthetic.balance(corner), aesthetic.room(corner)) == (0.0, 0.0)


def test_composition_of_two() -> None:
    # Centres at x = 14 and 38, y = 24, areas 144 and 256: the mass is at x = (144·14 + 256·38)/400 = 29.36.
    pair = Scene((Object("square", "red", 12, 8, 18), Object("square", "red", 16, 30, 16)))
    assert aesthetic.balance(pair) == pytest.approx(1 - 5.36 / 18)
    assert aesthetic.room(pair) == pytest.approx(2 / 8)  # 2 px to the right edge; 10 px between the two
    assert aesthetic.harmony(pair) == 1.0
    mixed = Scene((pair.objects[0], replace(pair.objects[1], color="green")))
    assert aesthetic.harmony(mixed) < 1.0


def test_target_falls_with_every_damage_and_stays_on_the_scale() -> None:
    kinds = len(aesthetic.DAMAGES)
    clean = aesthetic.target([CENTRED], torch.zeros(1, kinds)).item()
    assert clean == pytest.approx(1 + 9 * (1 + aesthetic.composition(CENTRED)) / 2)
    for kind in range(kinds):
        strengths = torch.zeros(4, kinds)
        strengths[:, kind] = torch.tensor([0.0, 0.3, 0.6, 1.0])
        scores = aesthetic.target([CENTRED] * 4, strengths).tolist()
        assert scores == sorted(scores, reverse=True) and len(set(scores)) == 4
        assert scores[-1] == pytest.approx(1 + (clean - 1) * (1 - aesthetic.DAMAGES[kind].harm))
    worst = aesthetic.target([CENTRED], torch.ones(1, kinds)).item()
    assert 1.0 < worst < 1.1 < clean < 10.0


def test_stronger_damage_changes_more_and_none_changes_nothing() -> None:
    images = SceneStream(train_specs(), 8, seed=0).batch(0).images
    kinds = len(aesthetic.DAMAGES)
    assert torch.equal(aesthetic.spoil(images, torch.zeros(8, kinds), _generator()), images)
    for kind in range(kinds):
        change = []
        for strength in (0.2, 0.6, 1.0):
            strengths = torch.zeros(8, kinds)
            strengths[:, kind] = strength
            spoilt = aesthetic.spoil(images, strengths, _generator())
            assert spoilt.min() >= -1 and spoilt.max() <= 1
            change.append((spoilt - images).abs().mean().item())
        assert change == sorted(change) and change[0] > 0


def test_a_quarter_of_the_pictures_stays_clean() -> None:
    strengths = aesthetic.draw_strengths(4000, _generator())
    clean = (strengths == 0).all(dim=1).float().mean().item()
    assert clean == pytest.approx(0.75 ** len(aesthetic.DAMAGES), abs=0.03)
    assert strengths.min() >= 0 and strengths.max() < 1


def test_the_head_learns_from_the_features(trained_clip: tuple[open_clip.CLIP, Path], tmp_path: Path) -> None:
    model, _ = trained_clip
    stream = SceneStream(train_specs(), 16, seed=400)
    head, metrics = aesthetic.train_aesthetic(model, stream, 2, tmp_path, 0, CPU, torch.float32)
    assert metrics["rmse"] > 0
    head.save_pretrained(tmp_path / "head")
    loaded = aesthetic.load_head(tmp_path / "head", CPU)
    found = aesthetic.correlation(model, head, stream, 4, CPU)
    assert found == aesthetic.correlation(model, loaded, stream, 4, CPU)
    assert all(-1 <= value <= 1 for column in found.values() for value in column.values())


# --- the order of words -----------------------------------------------------------


@pytest.fixture(scope="module")
def untrained() -> LlamaGenPolicy:
    policy = generator.build_policy(vq.build_vq())
    generator.look_at_neighbours(policy.text_encoder)
    return policy


def test_heads_look_at_their_neighbours(untrained: LlamaGenPolicy) -> None:
    attention = untrained.text_encoder.encoder.block[0].layer[0].SelfAttention
    bias = attention.compute_bias(9, 9)[0]  # (heads, 9, 9): of the middle word, 4, for each of the others
    seen = [int(bias[head, 4].argmax()) - 4 for head in range(len(generator.NEIGHBOURS))]
    assert seen == list(generator.NEIGHBOURS)


def test_a_word_carries_the_one_before_it_in_its_own_coordinates(untrained: LlamaGenPolicy) -> None:
    attention = untrained.text_encoder.encoder.block[1].layer[0].SelfAttention
    through = attention.o.weight @ attention.v.weight  # of all heads, if they see the same word
    assert torch.allclose(through, torch.eye(len(through)), atol=1e-5)


def test_order_loss_by_hand(monkeypatch: pytest.MonkeyPatch, untrained: LlamaGenPolicy) -> None:
    """One prompt of three has a twin; its picture is e² times as likely under its own words: −log σ(2)."""
    prompts = ["a photo of a red circle and a blue square", "a photo of a ring", "a photo of two rings"]
    by_prompt = {spec["prompt"]: spec for spec in all_specs()}
    batch = SceneBatch([by_prompt[prompt] for prompt in prompts], [], torch.zeros(0))
    codes, asked = torch.zeros(3, 4, dtype=torch.long), []
    logits = torch.zeros(3, 4, 2)
    logits[0, 0, 0] = 30.0  # log p of the first code: 0 instead of −log 2

    def unsure(states: torch.Tensor, mask: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """The first code has probability e⁻², the others 1/2."""
        return torch.tensor([[[0.0, math.log(math.e**2 - 1)], [0, 0], [0, 0], [0, 0]]])

    encode = untrained.encode_text
    monkeypatch.setattr(untrained, "encode_text", lambda texts: asked.extend(texts) or encode(texts))
    monkeypatch.setattr(untrained, "forward", unsure)
    loss = generator.order_loss(untrained, batch, codes, logits, rows=[0, 1, 2])
    assert asked == ["a photo of a blue circle and a red square"]
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2)), abs=1e-5)
    assert generator.order_loss(untrained, batch, codes, logits, rows=[1, 2]).item() == 0


def test_the_steps_of_the_phases_add_up() -> None:
    ends = [2600, 3000, 3800, 3950, 4100]
    assert generator.phase_steps(4100) == [range(*both) for both in pairwise([0, *ends])]
    assert [len(own) for own in generator.phase_steps(2)] == [1, 0, 1, 0, 0]


def test_the_generator_goes_through_its_phases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Twenty-six steps: 16, 3, 5, 1 and 1. Only order leaves tags out, only the last two phases have wrong words, and in the
    very last only the caption projector is trained."""
    seen: list[tuple[int, float]] = []
    mixtures: list[int] = []

    class Stream(SceneStream):
        def of(self, tag_weights: Any) -> SceneStream:
            mixtures.append(len(tag_weights))
            return self

        def batch(self, step: int, wrong: float = 0.0) -> SceneBatch:
            seen.append((step, wrong))
            return super().batch(step, wrong)

    stream = Stream(train_specs(), 2, seed=200)
    train = partial(generator.train_generator, vq.build_vq(), stream, 26, seed=0, device=CPU, dtype=torch.float32)
    policy, _ = train(folder=tmp_path)
    assert seen == [(step, {24: 0.35, 25: 0.45}.get(step, 0.0)) for step in range(26)]
    assert mixtures == [6, 2, 6, 6, 6]
    states = [torch.load(tmp_path / f"generator_{phase}.pt", weights_only=True) for phase in ("doubt", "distrust")]
    before, after = (state["model"] for state in states)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"adapter.caption_projector.0.weight", "adapter.caption_projector.2.weight"}
    assert all(p.requires_grad for p in policy.trunk.parameters())  # frozen in that phase only

    torch.manual_seed(99)  # the state of the global generator where a run goes on does not matter
    for phase in ("order", "settle", "doubt", "distrust"):
        (tmp_path / f"generator_{phase}.pt").unlink()
    again, _ = train(folder=tmp_path)
    assert seen[26:] == seen[16:26]
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), again.parameters(), strict=True))


# --- the command ----------------------------------------------------------------

SIZES = Sizes(scenes=12, images=12, draws=1, batches=1, questions=4)
STEPS = {"vq_steps": 3, "generator_steps": 2, "clip_steps": 2, "aesthetic_steps": 2, "reasoner_steps": 2}


def _config(out: Path, **settings: Any) -> PretrainConfig:
    everything: dict[str, Any] = {"output_dir": str(out), **STEPS, **settings}
    return PretrainConfig(**everything)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All stages with as little work as they can do. Read only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vq, "BATCH", 4)
        patch.setattr(vq, "KMEANS_BATCHES", 4)
        patch.setattr(vq, "KMEANS_CELLS", 600)
        patch.setattr(generator, "BATCH", 2)
        patch.setattr(clip, "BATCH", 8)
        patch.setattr(aesthetic, "BATCH", 8)
        patch.setattr(reasoner, "BATCH", 4)
        out = tmp_path_factory.mktemp("pretrain") / "checkpoints"
        return command.pretrain(_config(out), SIZES)


def test_checkpoints_have_cards_with_their_scores(pretrained: Path) -> None:
    columns = {
        "states/vq": ["rendered", "reconstructed"],
        "generator": ["guidance 1", f"guidance {TrainConfig().guidance:g}"],
        "clip": ["uniform, rendered", "uniform, reconstructed", "balanced, rendered", "balanced, reconstructed"],
        "aesthetic": ["all", "clean"],
        "reasoner": ["question", "wrong on purpose"],
    }
    for name, expected in columns.items():
        card = (pretrained / name / "README.md").read_text(encoding="utf-8")
        facts = json.loads((pretrained / name / "scores.json").read_text(encoding="utf-8"))
        assert list(facts["scores"]) == expected
        assert f"| | {' | '.join(expected)} |" in card and "2 steps, seed 0" in card.replace("3 steps", "2 steps")
        assert f"gcpo-t2i pretrain {' '.join(f'--{name} {steps}' for name, steps in STEPS.items())}" in card
        assert f"{facts['parameters']:,} parameters" in card and facts["seconds"] >= 0
        assert str(pretrained.parent) not in card
    assert (pretrained / "generator" / "vq" / "README.md").is_file()


def test_rendered_scenes_are_read_without_error(pretrained: Path) -> None:
    scores = json.loads((pretrained / "states" / "vq" / "scores.json").read_text())["scores"]
    assert scores["rendered"]["overall"] == 1.0 and scores["reconstructed"]["overall"] < 1.0
    assert list(scores["rendered"])[:2] == ["overall", "overall_ci95"]
    assert scores["reconstructed"]["code noise (nats)"] >= 0


def test_checkpoints_load_and_are_small_enough_to_ship(pretrained: Path) -> None:
    policy = load_policy(pretrained / "generator")
    assert policy.grid == (12, 12)
    name = f"local-dir:{pretrained / 'clip'}"
    images = [Image.new("RGB", (48, 48), color) for color in ("red", "white")]
    assert len(Clip(model=name)(images, ["a photo of a red circle"] * 2)) == 2
    assert len(Aesthetic(head=pretrained / "aesthetic", model=name)(images, [""] * 2)) == 2
    model, tokenizer = load_text_model(str(pretrained / "reasoner"), CPU)
    assert len(answer(model, tokenizer, ["Ann has two pens."], tokens=3, temperature=1.0, seed=0, batch_size=1)[0]) <= 3
    assert (pretrained / "reasoner" / "model.safetensors").stat().st_size < 4 * 10**6
    sizes = [
        path.stat().st_size
        for stage in ("generator", "clip", "aesthetic", "reasoner")
        for path in (pretrained / stage).rglob("*")
        if path.is_file()
    ]
    assert sum(sizes) < 25 * 10**6


def _snapshot(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_finished_stages_are_not_touched_again(pretrained: Path) -> None:
    before = _snapshot(pretrained)
    config = _config(pretrained)
    with pytest.raises(UserError, match="--resume to go on with it"):
        command.pretrain(config, SIZES)
    assert command.pretrain(replace(config, resume=True), SIZES) == pretrained
    assert _snapshot(pretrained) == before


def test_going_on_with_other_settings_is_refused(pretrained: Path) -> None:
    config = _config(pretrained, resume=True)
    with pytest.raises(UserError, match=r"stage 'vq' .* made with seed 0, not 1; pass --seed 0, or --overwrite"):
        command.pretrain(replace(config, seed=1), SIZES)
    with pytest.raises(UserError, match=r"stage 'clip' .* made with clip_steps 2, not 9; pass --clip_steps 2"):
        command.pretrain(replace(config, clip_steps=9), SIZES)


@pytest.mark.parametrize(("stage", "first"), [("generator", "vq"), ("clip", "vq"), ("aesthetic", "clip")])
def test_a_stage_without_its_predecessor_names_what_to_run_first(tmp_path: Path, stage: str, first: str) -> None:
    out = tmp_path / "new"
    config = _config(out, stage=stage)
    with pytest.raises(UserError, match=f"'{stage}' needs '{first}'.*gcpo-t2i pretrain --stage {first} --output_dir"):
        command.pretrain(config)
    assert not out.exists()


def test_overwriting_a_stage_deletes_what_was_made_from_it_and_nothing_else(tmp_path: Path) -> None:
    names = ("states/vq/config.json", "generator/a", "clip/a", "aesthetic/a", "mine.txt", "states/mine.txt")
    states = ("vq.pt", "vq_warmup.pt", "vq.json", "generator_words.pt", "clip.jsonl", "aesthetic.pt")
    for name in (*names, *(f"states/{state}" for state in states)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def left() -> set[str]:
        return {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}

    everything = left()
    command._remove(["clip"], tmp_path)
    assert everything - left() == {"clip/a", "aesthetic/a", "states/clip.jsonl", "states/aesthetic.pt"}
    command._remove(["vq"], tmp_path)
    assert left() == {"mine.txt", "states/mine.txt"}


def test_time_adds_up_over_interruptions(tmp_path: Path) -> None:
    (tmp_path / "states").mkdir()
    (tmp_path / "states" / "clip.json").write_text(json.dumps({"seed": 0, "steps": 5, "seconds": 100.0}))
    run = command.Run(PretrainConfig(clip_steps=5), tmp_path, CPU, torch.float32, SIZES)
    with pytest.raises(KeyboardInterrupt), command._timed("clip", run):
        raise KeyboardInterrupt
    record = json.loads((tmp_path / "states" / "clip.json").read_text())
    assert record["seed"] == 0 and record["steps"] == 5 and 100.0 <= record["seconds"] < 200.0


def test_a_card_shows_half_widths_where_there_are_some(tmp_path: Path) -> None:
    facts = {"stage": "vq", "command": "gcpo-t2i pretrain", "seed": 0, "steps": 7, "seconds": 90.0}
    scores = {"a": {"overall": 0.5, "overall_ci95": 0.25, "colors": 1.0}, "b": {"overall": 0.125}}
    write_card(tmp_path, facts | machine(CPU, torch.bfloat16), Measured(1234, scores))
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| | a | b |\n|---|---|---|\n| overall | 0.500 ± 0.250 | 0.125 |\n| colors | 1.000 |  |\n" in card
    assert "7 steps, seed 0: 1.5 minutes on" in card and "1,234 parameters" in card and "bfloat16" in card
    assert json.loads((tmp_path / "scores.json").read_text())["scores"] == scores


def test_the_tokenizers_ceiling_is_measured_on_what_it_leaves_of_the_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    from gcpo_t2i.shapes.pretrain import cards

    grey = Image.new("RGB", (48, 48), (240, 240, 240))
    monkeypatch.setattr(cards, "decode_codes", lambda model, codes, grid: [grey] * len(codes))
    measured = measure_vq(vq.build_vq().eval(), Sizes(scenes=12))
    assert measured.scores["rendered"]["overall"] == 1.0
    assert measured.scores["reconstructed"]["overall"] == 0.0


def test_codes_that_follow_from_their_cells_have_no_noise() -> None:
    # Four cells, two of them equal. The code noise is H(cell, code) − H(cell).
    images = torch.zeros(1, 3, 8, 8)
    images[..., :4, 4:] = 0.5
    images[..., 4:, 4:] = 1.0
    for codes, noise in (([7, 8, 7, 9], 0.0), ([7, 8, 6, 9], 0.5 * np.log(2)), ([7, 7, 7, 7], 0.0)):
        # [7, 8, 6, 9] splits the cell that half of the places hold in two halves: 1/2 · log 2.
        assert vq.code_noise(torch.tensor([codes]), images) == pytest.approx(noise, abs=1e-9)


# --- the reasoner ---------------------------------------------------------------


def test_the_reasoner_learns_what_the_assistant_says_and_nothing_else() -> None:
    """By hand: labels are the ids of the answer and of its end, behind the prompt; padding counts for nothing."""
    tokenizer = build_tokenizer()
    examples = [Example("Ann has two pens.", "answer: 2"), Example("", "two plus two is four. answer: 4")]
    ids, mask, labels = reasoner.collate(tokenizer, examples)
    first = tokenizer("<|user|>Ann has two pens.<|end|><|assistant|>answer: 2<|end|>")["input_ids"]
    assert ids[0, : len(first)].tolist() == first and mask[0].sum() == len(first)
    said = [*tokenizer("answer: 2")["input_ids"], tokenizer.eos_token_id]
    assert labels[0].tolist() == [-100] * (len(first) - len(said)) + said + [-100] * (ids.shape[1] - len(first))
    empty = tokenizer("<|user|><|end|><|assistant|>")["input_ids"]
    assert ids[1, :3].tolist() == empty and (labels[1, :3] == -100).all()
