"""PickScore, HPS and LAION's aesthetic head, on small models of random weights in the format of the published ones."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from torch.nn import functional as F
from torchvision.transforms import functional as TF
from transformers import AutoModel, AutoProcessor

import rewards.hps
from rewards import RewardError, load_reward, score
from rewards.aesthetic import LAION_CLIP, Aesthetic, LaionHead
from rewards.clip import Clip, ClipEncoder, _quick_gelu
from rewards.hub import hub_file, pretrained
from rewards.pickscore import PickScore, _features
from tests.reward_models import add_open_clip_architecture, open_clip_state, pictures, save_clip

PROMPTS = ["a cat", "a dog on a mat", "a cat", "an owl"]
IMAGES = pictures(4)


class Offline:
    """A hub that cannot be reached, at once instead of after a minute of retries."""

    def __call__(self, repo: str, file: str) -> str:
        raise OSError("Name or service not known")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.hf_hub_download", Offline())


# PickScore ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pick_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_clip(tmp_path_factory.mktemp("pick"))


def test_pickscore_is_the_scaled_cosine_of_the_librarys_own_forward_pass(pick_folder: str) -> None:
    """`CLIPModel.forward` has a path of its own from inputs to exp(logit_scale) · cosine, for all pairs: its diagonal."""
    model, processor = AutoModel.from_pretrained(pick_folder).eval(), AutoProcessor.from_pretrained(pick_folder)
    inputs = processor(text=PROMPTS, images=IMAGES, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits_per_image.diagonal().tolist()
    reward = load_reward("pickscore", model=pick_folder, processor=pick_folder, device="cpu")
    assert score(reward, IMAGES, PROMPTS) == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 1
    assert score(reward, [], []) == []


def test_pickscore_in_batches_is_the_same(pick_folder: str) -> None:
    whole = PickScore(pick_folder, pick_folder, device="cpu")(IMAGES, PROMPTS)
    assert PickScore(pick_folder, pick_folder, batch_size=3, device="cpu")(IMAGES, PROMPTS) == pytest.approx(
        whole, abs=1e-4
    )


def test_long_prompts_are_cut_as_published(pick_folder: str) -> None:
    reward = PickScore(pick_folder, pick_folder, device="cpu")
    long = "a " * 200
    assert reward(IMAGES[:1], [long]) == pytest.approx(reward(IMAGES[:1], ["a " * 75]), abs=1e-4)


def test_features_of_older_and_newer_transformers_are_the_same(pick_folder: str) -> None:
    output = PickScore(pick_folder, pick_folder, device="cpu").model.get_image_features(torch.zeros(1, 3, 32, 32))
    assert not isinstance(output, torch.Tensor)  # transformers 5
    assert torch.equal(_features(output), output.pooler_output) and output.pooler_output.shape == (1, 12)
    assert torch.equal(_features(output.pooler_output), output.pooler_output)  # transformers 4


def test_a_checkpoint_of_another_kind_is_not_filled_with_random_weights(pick_folder: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in Path(pick_folder).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    save_file(
        {key: value for key, value in state.items() if "visual_projection" not in key}, tmp_path / "model.safetensors"
    )
    with pytest.raises(RewardError, match=r"lacks 1 of the weights of CLIPModel, such as visual_projection.weight"):
        PickScore(str(tmp_path), pick_folder, device="cpu")


@pytest.mark.usefixtures("no_network")
def test_a_model_that_is_not_there_names_the_file_and_the_cure() -> None:
    with pytest.raises(
        RewardError,
        match=r"reward 'pickscore': config.json of 'yuvalkirstain/PickScore_v1' is not on this machine and cannot be "
        r"downloaded; where there is a network: hf download yuvalkirstain/PickScore_v1  \(or name a local folder",
    ):
        load_reward("pickscore", device="cpu")
    with pytest.raises(RewardError, match=r"HPS_v2.1_compressed.pt of 'xswu/HPSv2' is not on this machine"):
        load_reward("hps", device="cpu")


def test_gated_private_and_misspelt_models_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.errors as errors

    def raising(kind: type[Exception]):
        def download(repo: str, file: str) -> str:
            raise kind.__new__(kind)

        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)

    raising(errors.GatedRepoError)
    with pytest.raises(
        RewardError, match=r"'org/x' is gated: accept .*huggingface.co/org/x, .*hf auth login && hf download org/x w"
    ):
        hub_file("org/x", "w")
    raising(errors.RepositoryNotFoundError)
    with pytest.raises(RewardError, match="'org/x' is not on the Hugging Face hub, or is private"):
        hub_file("org/x", "w")
    raising(errors.EntryNotFoundError)
    with pytest.raises(RewardError, match="'org/x' has no file w"):
        hub_file("org/x", "w")
    monkeypatch.undo()
    with pytest.raises(RewardError, match="'a/b/c' is neither a folder nor an id"):
        hub_file("a/b/c", "w")
    with pytest.raises(RewardError, match=r"has no file config.json"):
        pretrained(AutoModel, str(tmp_path))


# HPS ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> str:
    add_open_clip_architecture(tmp_path_factory.mktemp("arch"), "tiny-h")
    return "tiny-h"


@pytest.fixture(scope="module")
def hps_file(architecture: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("hps") / "HPS_v2.1_compressed.pt"
    torch.save({"epoch": 1, "name": "hps", "state_dict": open_clip_state(architecture)}, path)
    return str(path)


def test_hps_is_the_cosine_after_the_published_preparation(
    architecture: str, hps_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewards.hps, "ARCHITECTURE", architecture)
    model = open_clip.create_model(architecture)
    model.load_state_dict(torch.load(hps_file, weights_only=True)["state_dict"])
    model.eval()
    pixels = torch.stack([TF.to_tensor(image) for image in IMAGES])  # (4, 3, 30, 40) in [0, 1]
    small = TF.resize(pixels, [24, 32], TF.InterpolationMode.BICUBIC, antialias=True)  # the longer edge is 32 now,
    small = F.pad(small, (0, 0, 4, 4))  # and black above and below makes it square
    constants = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in constants)
    with torch.no_grad():
        image, text, _ = model((small - mean) / std, open_clip.get_tokenizer(architecture)(PROMPTS))
    reward = load_reward("hps", checkpoint=hps_file, device="cpu")
    assert score(reward, IMAGES, PROMPTS) == pytest.approx((image * text).sum(dim=-1).tolist(), abs=1e-5)
    assert reward.range == (-1.0, 1.0)


def test_hps_versions_are_files_of_the_hub(architecture: str, hps_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repo: str, file: str) -> str:
        asked.append((repo, file))
        return hps_file

    monkeypatch.setattr(rewards.hps, "ARCHITECTURE", architecture)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    load_reward("hps", device="cpu")
    load_reward("hps", version="v2", device="cpu")
    assert asked == [("xswu/HPSv2", "HPS_v2.1_compressed.pt"), ("xswu/HPSv2", "HPS_v2_compressed.pt")]
    with pytest.raises(RewardError, match=r"reward 'hps': version 'v3' is unknown; did you mean 'v2'\?"):
        load_reward("hps", version="v3")
    assert rewards.hps.FILES.keys() == {"v2", "v2.1"}


def test_hps_of_another_architecture_and_of_code_are_refused(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewards.hps, "ARCHITECTURE", architecture)
    state = open_clip_state(architecture)
    state["visual.proj"] = state["visual.proj"][:, :3]
    torch.save({"state_dict": state}, tmp_path / "other.pt")
    with pytest.raises(RewardError, match=r"reward 'hps': CLIP model 'tiny-h' .*other.pt.*state_dict"):
        load_reward("hps", checkpoint=str(tmp_path / "other.pt"), device="cpu")
    torch.save({"state_dict": Path("/tmp")}, tmp_path / "code.pt")
    with pytest.raises(RewardError, match="is no file of weights alone, and loading it could run code"):
        load_reward("hps", checkpoint=str(tmp_path / "code.pt"), device="cpu")
    with pytest.raises(RewardError, match=r"gone.pt"):
        load_reward("hps", checkpoint=str(tmp_path / "gone.pt"), device="cpu")


# CLIP: tags and files -------------------------------------------------------------------------------------------------


def test_clip_takes_an_architecture_with_a_checkpoint_file(architecture: str, tmp_path: Path) -> None:
    state = open_clip_state(architecture, seed=3)
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "epoch_1.pt")
    reward = Clip(architecture, str(tmp_path / "epoch_1.pt"), device="cpu")
    model = open_clip.create_model(architecture)
    model.load_state_dict(state)
    model.eval()
    with torch.no_grad():
        image, text, _ = model(
            torch.stack([reward.encoder.preprocess(i) for i in IMAGES]), open_clip.get_tokenizer(architecture)(PROMPTS)
        )
    assert reward(IMAGES, PROMPTS) == pytest.approx((image * text).sum(dim=-1).tolist(), abs=1e-5)


def test_weights_trained_with_quick_gelu_get_it(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _quick_gelu("ViT-L-14", "openai") and not _quick_gelu("ViT-H-14", "laion2b_s32b_b79k")
    assert not _quick_gelu("ViT-L-14", None) and not _quick_gelu("ViT-L-14", "/some/file.pt")
    model = open_clip.create_model(architecture, force_quick_gelu=True)  # that this is what the flag does
    assert "QuickGELU" in {type(module).__name__ for module in model.modules()}
    asked = {}

    def create(name: str, pretrained: str, **settings):
        asked.update(settings)
        raise RuntimeError("no network")

    monkeypatch.setattr(open_clip, "create_model_from_pretrained", create)
    with pytest.raises(RewardError, match=r"no network; .*hf download timm/vit_large_patch14_clip_224.openai"):
        ClipEncoder("ViT-L-14", "openai", "cpu", 4)
    assert asked["force_quick_gelu"] is True


# LAION's aesthetic head -----------------------------------------------------------------------------------------------

LAYERS = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}


def laion_state() -> dict[str, torch.Tensor]:
    """The ten tensors of the published file, by name and shape."""
    generator = torch.Generator().manual_seed(0)
    shapes = {f"layers.{n}.weight": shape for n, shape in LAYERS.items()}
    shapes |= {f"layers.{n}.bias": shape[:1] for n, shape in LAYERS.items()}
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def laion_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("laion") / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(laion_state(), path)
    return path


def test_laions_head_is_five_linear_maps_of_the_normalised_features(laion_file: Path, tmp_path: Path) -> None:
    add_open_clip_architecture(tmp_path / "arch", "tiny-768", width=768)
    torch.save(open_clip_state("tiny-768"), tmp_path / "clip.pt")
    settings = {"model": "tiny-768", "pretrained": str(tmp_path / "clip.pt"), "device": "cpu"}
    features = ClipEncoder("tiny-768", settings["pretrained"], "cpu", 4).encode_images(IMAGES)
    assert torch.allclose(features.norm(dim=-1), torch.ones(4))
    expected, state = features, laion_state()
    for number in LAYERS:
        expected = F.linear(expected, state[f"layers.{number}.weight"], state[f"layers.{number}.bias"])
    reward = load_reward("aesthetic", head=str(laion_file), **settings)
    assert score(reward, IMAGES, PROMPTS) == pytest.approx(expected.squeeze(-1).tolist(), abs=1e-4)


def test_laions_head_goes_with_openais_clip_and_ours_with_the_shipped_one(
    laion_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Any768:
        dim = 768

    asked = []
    monkeypatch.setattr("rewards.aesthetic.encoder", lambda *settings: asked.append(settings) or Any768())
    Aesthetic(laion_file, device="cpu", batch_size=8)
    Aesthetic(laion_file, model="ViT-L-14-quickgelu", pretrained="file.pt", device="cpu", batch_size=8)
    with pytest.raises(RewardError, match="CLIP model 'shapesworld' gives 768"):
        Aesthetic(device="cpu")
    assert [settings[:2] for settings in asked] == [
        LAION_CLIP,
        ("ViT-L-14-quickgelu", "file.pt"),
        ("shapesworld", None),
    ]
    assert LAION_CLIP == ("ViT-L-14", "openai")


@pytest.mark.parametrize("broken", ["missing", "extra", "shape", "code", "text", "list", "absent"])
def test_a_file_that_is_no_such_head_is_an_error(tmp_path: Path, broken: str) -> None:
    path, state = tmp_path / "head.pth", laion_state()
    match broken:
        case "missing":
            del state["layers.7.bias"]
        case "extra":
            state["layers.9.bias"] = torch.zeros(1)
        case "shape":
            state["layers.0.weight"] = torch.zeros(1024, 512)
    torch.save(Path("/tmp") if broken == "code" else [1, 2] if broken == "list" else state, path)
    if broken == "text":
        path.write_text("<html>404</html>")
    if broken == "absent":
        path.unlink()
    with pytest.raises(
        RewardError, match=r"head.pth is no aesthetic head of LAION's \(an MLP of 768-1024-128-64-16-1\)"
    ):
        LaionHead.from_file(path)
