"""CLIP score and aesthetic score on a tiny random open_clip model, saved and loaded as the shipped one is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from gcpo_t2i.shapes import checkpoint_path
from rewards import RewardError, load_reward, score
from rewards.aesthetic import Aesthetic, AestheticHead
from rewards.clip import Clip, ClipEncoder

WORDS = ["<pad>", "<unk>", "<bos>", "<eos>", "a", "red", "blue", "circle", "square"]
PROMPTS = ["a red circle", "a blue square", "a red circle", "a circle"]


def save_tiny_clip(folder: Path, width: int = 16) -> None:
    folder.mkdir()
    vocab = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 3)]
    )
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    text = {"context_length": 8, "vocab_size": len(WORDS), "width": 16, "heads": 2, "layers": 1}
    text |= {"hf_tokenizer_name": "tiny", "pool_type": "eos", "eos_id": 3, "pad_id": 0}
    vision = {"image_size": 48, "patch_size": 12, "width": 16, "head_width": 8, "layers": 1}
    config = {"model_cfg": {"embed_dim": width, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {"size": 48}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}")
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )


@pytest.fixture(scope="module")
def clip_name(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("clip") / "tiny"
    save_tiny_clip(folder)
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)) for _ in range(4)]


# Clip -----------------------------------------------------------------------------------------------------------------


def test_score_is_the_cosine_of_open_clips_own_features(clip_name: str, images: list[Image.Image]) -> None:
    model, _, preprocess = open_clip.create_model_and_transforms(clip_name)
    tokenizer = open_clip.get_tokenizer(clip_name)
    model.eval()
    with torch.no_grad():
        image = model.encode_image(torch.stack([preprocess(i) for i in images]))  # type: ignore[misc, operator]
        text = model.encode_text(tokenizer(PROMPTS))  # type: ignore[operator]
    expected = F.cosine_similarity(image, text).tolist()
    assert Clip(clip_name, device="cpu")(images, PROMPTS) == pytest.approx(expected, abs=1e-6)
    assert len(set(expected)) == 4


def test_batch_size_changes_nothing(clip_name: str, images: list[Image.Image]) -> None:
    whole = Clip(clip_name, device="cpu")(images, PROMPTS)
    for batch_size in (1, 3):
        assert Clip(clip_name, batch_size=batch_size, device="cpu")(images, PROMPTS) == pytest.approx(whole, abs=1e-6)
    assert Clip(clip_name, device="cpu")([], []) == []


def test_each_distinct_prompt_is_encoded_once(clip_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = ClipEncoder(clip_name, None, "cpu", batch_size=2)
    encoded: list[int] = []
    encode_text = encoder.model.encode_text

    def counting(tokens: torch.Tensor) -> torch.Tensor:
        encoded.append(len(tokens))
        return encode_text(tokens)

    monkeypatch.setattr(encoder.model, "encode_text", counting)
    first = encoder.encode_texts(PROMPTS)
    assert encoded == [2, 1]  # three distinct prompts, two per batch
    assert torch.equal(first[0], first[2])
    assert torch.equal(encoder.encode_texts(PROMPTS[::-1]), first.flip(0))
    assert encoded == [2, 1]
    monkeypatch.setattr("rewards.clip._MAX_CACHED_TEXTS", 2)
    encoder.encode_texts(["a red circle"])
    assert encoded == [2, 1, 1]  # over the limit: the cache starts anew


def test_features_are_frozen_unit_vectors(clip_name: str, images: list[Image.Image]) -> None:
    encoder = ClipEncoder(clip_name, None, "cpu", batch_size=64)
    features = encoder.encode_images(images)
    assert features.shape == (4, encoder.dim) == (4, 16)
    assert torch.allclose(features.norm(dim=-1), torch.ones(4))
    assert not features.requires_grad
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    assert not encoder.model.training


def test_as_a_loaded_reward(clip_name: str, images: list[Image.Image]) -> None:
    reward = load_reward("clip", model=clip_name, device="cpu")
    assert reward.range == (-1.0, 1.0)
    scores = score(reward, images, PROMPTS, {"tag": [None] * 4})
    assert scores == Clip(clip_name, device="cpu")(images, PROMPTS)


def test_rewards_with_equal_settings_share_the_model(clip_name: str) -> None:
    assert Clip(clip_name, device="cpu").encoder is Clip(clip_name, device="cpu").encoder


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "local-dir:/nowhere"}, "no such folder: /nowhere"),
        ({"model": "ViT-B-3"}, "CLIP model 'ViT-B-3' is unknown; near: ViT-B-32"),
        ({"model": "qqqq"}, "CLIP model 'qqqq' is unknown; near: none"),
        ({"model": "ViT-B-32"}, "needs `pretrained`, a file or one of: .*openai"),
        ({"model": "ViT-B-32", "pretrained": "no-such-tag"}, "pretrained 'no-such-tag'"),
    ],
)
def test_unknown_models_are_errors(settings: dict[str, str], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        Clip(device="cpu", **settings)  # type: ignore[arg-type]


def test_a_folder_without_weights_is_an_error_and_not_a_random_model(clip_name: str, tmp_path: Path) -> None:
    config = Path(clip_name.removeprefix("local-dir:")) / "open_clip_config.json"
    (tmp_path / "open_clip_config.json").write_text(config.read_text())
    with pytest.raises(RewardError, match="Required pretrained weights"):
        Clip(f"local-dir:{tmp_path}", device="cpu")


# Aesthetic ------------------------------------------------------------------------------------------------------------


def test_linear_head_by_hand() -> None:
    head = AestheticHead(dim=2, hidden=0)
    with torch.no_grad():
        head.layers.weight.copy_(torch.tensor([[2.0, -1.0]]))  # type: ignore[union-attr, operator]
        head.layers.bias.fill_(5.0)  # type: ignore[union-attr, operator]
    # 5 + 2·0.6 − 0.8 = 5.4, 5 + 2·0 − 1 = 4
    assert head(torch.tensor([[0.6, 0.8], [0.0, 1.0]])).tolist() == pytest.approx([5.4, 4.0])


@pytest.mark.parametrize("hidden", [0, 8])
def test_a_saved_head_is_the_same_head(tmp_path: Path, hidden: int) -> None:
    head = AestheticHead(dim=16, hidden=hidden)
    head.save_pretrained(tmp_path / "head")
    assert sorted(path.name for path in (tmp_path / "head").iterdir()) == ["config.json", "model.safetensors"]
    again = AestheticHead.from_pretrained(tmp_path / "head")
    features = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(features), head(features))


def test_score_is_the_head_on_the_image_features(clip_name: str, images: list[Image.Image], tmp_path: Path) -> None:
    head = AestheticHead(dim=16)
    head.save_pretrained(tmp_path)
    reward = load_reward("aesthetic", head=str(tmp_path), model=clip_name, device="cpu")
    expected = head(ClipEncoder(clip_name, None, "cpu", 64).encode_images(images)).tolist()
    assert score(reward, images, PROMPTS) == pytest.approx(expected, abs=1e-6)
    assert reward.range is None
    assert score(reward, [], []) == []


def test_a_head_must_fit_the_clip_model(clip_name: str, tmp_path: Path) -> None:
    AestheticHead(dim=4).save_pretrained(tmp_path)
    with pytest.raises(RewardError, match=r"reads features of width 4, CLIP model 'local-dir:.*' gives 16"):
        Aesthetic(tmp_path, model=clip_name, device="cpu")


@pytest.mark.parametrize("broken", ["missing", "not json", "no dim", "weights", "shape"])
def test_a_broken_head_is_an_error(tmp_path: Path, broken: str) -> None:
    AestheticHead(dim=4).save_pretrained(tmp_path)
    match broken:
        case "missing":
            (tmp_path / "model.safetensors").unlink()
        case "not json":
            (tmp_path / "config.json").write_text("{")
        case "no dim":
            (tmp_path / "config.json").write_text('{"hidden": 64}')
        case "weights":
            (tmp_path / "model.safetensors").write_bytes(b"nonsense")
        case "shape":
            (tmp_path / "config.json").write_text('{"dim": 5, "hidden": 64}')
    with pytest.raises(RewardError, match="no aesthetic head in"):
        AestheticHead.from_pretrained(tmp_path)


# Shipped checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not checkpoint_path("clip").is_dir(), reason="the CLIP checkpoint has not been trained")
def test_the_shipped_clip_prefers_the_right_prompt() -> None:
    from gcpo_t2i.shapes import Object, Scene, render

    images = [
        Image.fromarray(render(Scene((Object(*what, 16, 16, 16),)))) for what in (("star", "red"), ("ring", "blue"))
    ]
    right, wrong = (
        ["a photo of a red star", "a photo of a blue ring"],
        ["a photo of a blue ring", "a photo of a red star"],
    )
    clip = Clip(device="cpu")
    assert all(a > b for a, b in zip(clip(images, right), clip(images, wrong), strict=True))


@pytest.mark.skipif(not checkpoint_path("aesthetic").is_dir(), reason="the aesthetic head has not been trained")
def test_the_shipped_aesthetic_head_scores_on_its_scale() -> None:
    scores = Aesthetic(device="cpu")([Image.new("RGB", (48, 48), (212, 212, 212))], [""])
    assert 0 < scores[0] < 11


@pytest.mark.skipif(checkpoint_path("clip").is_dir(), reason="the CLIP checkpoint is there")
def test_a_missing_checkpoint_is_named() -> None:
    with pytest.raises(RewardError, match=r"no such folder: .*checkpoints/clip"):
        Clip(device="cpu")
