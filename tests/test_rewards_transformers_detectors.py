"""GenEval's detectors from transformers, on small models of random weights in the published format: against the library's
own post-processing where it has one that fits, and against the formulas of the published evaluations where it has not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForUniversalSegmentation, AutoModelForZeroShotObjectDetection, AutoProcessor

from gcpo_t2i.config import RewardConfig
from gcpo_t2i.scoring import RewardSet
from rewards import Reward, RewardError, load_reward
from rewards.boxes import OFFICIAL, Detection, Limits
from rewards.coco import CLASSES, COLORS, geneval_names
from rewards.colors import ColorClassifier, asked_for, crop, templates
from rewards.detection import FLOOR
from rewards.geneval import GenEval
from rewards.mask2former import Mask2Former
from rewards.open_vocabulary import GroundingDino, Owlv2
from tests.reward_models import (
    VOC_SPELLING,
    pictures,
    save_grounding_dino,
    save_mask2former,
    save_owlv2,
)
from tests.test_rewards_clip import save_tiny_clip

LABELS = {index: VOC_SPELLING.get(name, name) for index, name in enumerate(CLASSES)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("detectors")
    return {
        "mask2former": save_mask2former(root / "mask2former", {"height": 96, "width": 96}, LABELS),
        "owlv2": save_owlv2(root / "owlv2"),
        "grounding_dino": save_grounding_dino(root / "grounding_dino"),
    }


SHIPPED = {"model": "shapesworld", "pretrained": None}  # a CLIP that is there
DETECTORS = {"mask2former": Mask2Former, "owlv2": Owlv2, "grounding_dino": GroundingDino}


def same(one: list[Detection], other: list[Detection]) -> bool:
    """Equal up to rounding; a batch is summed in another order than a single image."""
    return [d.name for d in one] == [d.name for d in other] and all(
        np.allclose((*a.box, a.confidence), (*b.box, b.confidence), atol=1e-2) for a, b in zip(one, other, strict=True)
    )


# All of them ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DETECTORS)
def test_batches_and_mixed_sizes_change_nothing(folders: dict[str, str], name: str) -> None:
    detector = DETECTORS[name](folders[name], batch_size=2, device="cpu")
    images = [
        *pictures(2, (100, 80)),
        pictures(1, (64, 96), seed=1)[0],
        pictures(1, (100, 80), seed=2)[0].convert("RGBA"),
    ]
    together = detector([images[i] for i in (0, 2, 1, 3)])
    alone = [detector([images[i]])[0] for i in (0, 2, 1, 3)]
    assert all(same(one, other) for one, other in zip(together, alone, strict=True))
    assert sum(len(found) for found in alone) > 5
    assert detector([]) == []
    for image, found in zip((images[i] for i in (0, 2, 1, 3)), together, strict=True):
        for one in found:
            assert one.confidence > FLOOR and one.name in CLASSES
            assert 0 <= one.box[0] <= one.box[2] <= image.width and 0 <= one.box[1] <= one.box[3] <= image.height


@pytest.mark.parametrize("name", DETECTORS)
def test_by_name_as_geneval_finds_them(folders: dict[str, str], name: str, tmp_path: Path) -> None:
    save_tiny_clip(tmp_path / "clip")
    settings = {"detector": name, "detector_kwargs": {"model": folders[name]}, "device": "cpu", "self_test": False}
    settings |= {"color_kwargs": {"model": f"local-dir:{tmp_path / 'clip'}", "pretrained": None}}
    reward = load_reward("geneval", score="dense", **settings)
    include = [[{"class": "tv remote", "count": 1}], [{"class": "cat", "count": 1, "color": "red"}]]
    scores = reward.fn(pictures(2, (80, 80)), ["", ""], tag=["single_object", "colors"], include=include)
    assert all(score is not None and 0 <= score <= 1 for score in scores)
    assert isinstance(reward.fn, GenEval) and isinstance(reward.fn.detector, DETECTORS[name])
    for word, key in (("unicorn", "class"), ("beige", "color")):
        clause = {"class": "cat", "count": 1} | {key: word}
        with pytest.raises(RewardError, match=f"the detector knows no {key} '{word}'"):
            reward.fn(pictures(1), [""], include=[[clause]])


def test_the_recipe_of_an_evaluation_names_the_detectors_model(folders: dict[str, str]) -> None:
    reward = Reward("geneval", GenEval(Owlv2(folders["owlv2"], device="cpu"), color_kwargs=SHIPPED, self_test=False))
    said = RewardSet({"geneval": reward}, {"geneval": 1.0}).versions([RewardConfig("geneval")])
    assert (said["geneval"]["detector"]["name"], said["geneval"]["detector"]["model"]) == ("Owlv2", folders["owlv2"])


def test_a_checkpoint_of_another_kind_is_refused(folders: dict[str, str]) -> None:
    with pytest.raises(RewardError, match=r"is a owlv2, and not a grounding-dino|owlv2"):
        GroundingDino(folders["owlv2"], device="cpu")
    with pytest.raises(RewardError, match="cannot be loaded as AutoModelForUniversalSegmentation"):
        Mask2Former(folders["owlv2"], device="cpu")
    with pytest.raises(RewardError, match=r"detector 'owlv2' has no setting 'modell'; did you mean 'model'\?"):
        GenEval("owlv2", detector_kwargs={"modell": 1})
    with pytest.raises(RewardError, match="color_kwargs are for detectors whose colours are read by CLIP"):
        GenEval("shapes", color_kwargs={"model": "ViT-B-32"})


# Class names ----------------------------------------------------------------------------------------------------------


def test_classes_are_cocos_as_geneval_names_them() -> None:
    assert len(CLASSES) == len(set(CLASSES)) == 80
    assert (CLASSES[0], CLASSES[9], CLASSES[57], CLASSES[62], CLASSES[79]) == (
        "person",
        "traffic light",
        "couch",
        "tv",
        "toothbrush",
    )
    assert geneval_names(LABELS) == CLASSES
    coco = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}
    assert geneval_names({i: coco.get(name, name).replace(" ", "_") for i, name in enumerate(CLASSES)}) == CLASSES
    assert geneval_names({i: f"LABEL_{i}" for i in range(80)}) == CLASSES
    assert geneval_names({1: "Rune-Stone", 0: "sofa"}) == ("couch", "rune stone")


# Mask2Former ----------------------------------------------------------------------------------------------------------


def test_mask2former_agrees_with_the_library_where_that_does_not_stretch(tmp_path: Path) -> None:
    """On 384 x 384 px the library's post-processing resizes masks as mmdetection does: same scores, labels and masks."""
    folder = save_mask2former(tmp_path, {"height": 384, "width": 384}, LABELS)
    images = pictures(1, (384, 384))
    model, processor = (
        AutoModelForUniversalSegmentation.from_pretrained(folder).eval(),
        AutoProcessor.from_pretrained(folder),
    )
    with torch.no_grad():
        output = model(**processor(images=images, return_tensors="pt"))
    expected = processor.post_process_instance_segmentation(
        output, threshold=FLOOR, target_sizes=[(384, 384)], return_binary_maps=True
    )
    for found, theirs in zip(Mask2Former(folder, device="cpu")(images), expected, strict=True):
        said = {
            (CLASSES[s["label_id"]], s["score"]): m
            for s, m in zip(theirs["segments_info"], theirs["segmentation"], strict=True)
        }
        assert len(found) == len(said) > 3
        for one in found:
            (mask,) = [
                m for (name, score), m in said.items() if name == one.name and abs(score - one.confidence) < 1e-4
            ]
            assert one.mask is not None and (one.mask == mask.bool().numpy()).mean() > 0.9999


def test_mask2former_boxes_are_the_extent_of_masks_in_the_images_own_pixels(folders: dict[str, str]) -> None:
    detector = Mask2Former(folders["mask2former"], device="cpu")
    detector.model.config.id2label = LABELS
    logits = torch.full((2, 81), -20.0)
    logits[0, 15], logits[1, 16] = 20.0, 0.0  # query 0 is a cat for sure; query 1 nothing in particular
    masks = torch.full((2, 8, 8), -8.0)
    masks[0, 2:4, 4:8] = 8.0  # of 8 x 8: rows 2 and 3, columns 4 to 7
    (found,) = detector._instances(logits[:, :], masks, (32, 32), (32, 32), (64, 32))[:1]
    # Bilinear edges of +-8 cross 0 half-way between cells: px 8 to 16 of 32 in height, 32 to 64 of 64 in width.
    assert (found.name, found.box) == ("cat", (32.0, 8.0, 64.0, 16.0))
    assert found.mask is not None and found.mask.shape == (32, 64)
    inside = torch.nn.functional.interpolate(masks[:1, None], (32, 32), mode="bilinear")
    inside = torch.nn.functional.interpolate(inside, (32, 64), mode="bilinear")[0, 0]
    quality = inside[inside > 0].sigmoid().mean().item()
    assert found.confidence == pytest.approx(quality, abs=1e-5) and 0.9 < quality < 1


def test_mask2former_leaves_out_the_padding(folders: dict[str, str]) -> None:
    detector = Mask2Former(folders["mask2former"], device="cpu")
    logits = torch.full((1, 81), -20.0)
    logits[0, 0] = 20.0
    masks = torch.full((1, 8, 8), 8.0)
    # 32 x 32 px of which the left half is the image of 16 x 32 px
    (found,) = detector._instances(logits, masks, (32, 32), (32, 16), (16, 32))
    assert found.box == (0.0, 0.0, 16.0, 32.0)
    assert detector._instances(logits, -masks, (32, 32), (32, 16), (16, 32)) == []  # sure of a class, but nowhere
    logits[0, 0] = 0.0
    logits[0, 80] = 20.0  # "no object"
    assert detector._instances(logits, masks, (32, 32), (32, 16), (16, 32)) == []


# OWLv2 and Grounding DINO ---------------------------------------------------------------------------------------------


def test_owlv2_agrees_with_the_library_which_reads_the_words_again_for_every_image(folders: dict[str, str]) -> None:
    images, words = pictures(2, (100, 60)), ["cat", "dog", "tv remote"]
    model = AutoModelForZeroShotObjectDetection.from_pretrained(folders["owlv2"]).eval()
    processor = AutoProcessor.from_pretrained(folders["owlv2"])
    texts = [[f"a photo of a {word}" for word in words]] * 2
    with torch.no_grad():
        output = model(**processor(text=texts, images=images, return_tensors="pt"))
    expected = processor.post_process_grounded_object_detection(
        output, threshold=FLOOR, target_sizes=[(60, 100)] * 2, text_labels=texts
    )
    found = Owlv2(folders["owlv2"], classes=words, device="cpu")(images)
    for own, theirs in zip(found, expected, strict=True):
        assert len(own) == len(theirs["scores"]) > 0
        assert [d.confidence for d in own] == pytest.approx(theirs["scores"].tolist(), abs=1e-5)
        assert [f"a photo of a {d.name}" for d in own] == theirs["text_labels"]
        limit = torch.tensor([100.0, 60.0, 100.0, 60.0])
        assert torch.tensor([d.box for d in own]).allclose(theirs["boxes"].clamp(min=0).minimum(limit), atol=1e-3)


def test_grounding_dino_scores_a_class_by_the_mean_over_its_tokens(folders: dict[str, str]) -> None:
    words = ["cat", "traffic light", "donut"]  # of one token, two words, and one word of two tokens
    detector = GroundingDino(folders["grounding_dino"], classes=words, device="cpu")
    assert detector.caption == "cat. traffic light. donut."
    # [CLS] cat . traffic light . don ##ut . [SEP]
    expected = torch.zeros(3, 10)
    expected[0, 1], expected[1, 3:5], expected[2, 6:8] = 1, 0.5, 0.5
    assert torch.equal(detector.tokens, expected)
    images = pictures(2, (90, 60))
    processor = AutoProcessor.from_pretrained(folders["grounding_dino"])
    inputs = processor(images=images, text=[words] * 2, return_tensors="pt")  # the library makes the same caption
    with torch.no_grad():
        output = detector.model(**inputs)
    probability = output.logits.sigmoid()
    means = torch.stack([probability[..., 1], probability[..., 3:5].mean(-1), probability[..., 6:8].mean(-1)], dim=-1)
    best, label = means.max(dim=-1)
    theirs = processor.post_process_grounded_object_detection(output, threshold=-1, target_sizes=[(60, 90)] * 2)
    for row, found in enumerate(detector(images)):
        kept = best[row] > FLOOR
        assert [d.confidence for d in found] == pytest.approx(best[row][kept].tolist(), abs=1e-5)
        assert [d.name for d in found] == [words[i] for i in label[row][kept].tolist()]
        limit = torch.tensor([90.0, 60.0, 90.0, 60.0])
        boxes = theirs[row]["boxes"][kept].clamp(min=0).minimum(limit)
        assert torch.tensor([d.box for d in found]).allclose(boxes, atol=1e-3)


def test_grounding_dino_refuses_a_caption_that_it_cannot_read(folders: dict[str, str]) -> None:
    with pytest.raises(RewardError, match=r"200 classes make a caption of 402 tokens, and .* reads 256; name fewer"):
        GroundingDino(folders["grounding_dino"], classes=["cat"] * 200, device="cpu")
    with pytest.raises(RewardError, match="cannot be told apart"):
        GroundingDino(folders["grounding_dino"], classes=["cat", "no. 7"], device="cpu")


# Colours --------------------------------------------------------------------------------------------------------------


def test_the_sentences_are_the_official_ones() -> None:
    assert COLORS == ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
    assert templates("red", "hot dog") == [
        "a photo of a red hot dog",
        "a photo of a red-colored hot dog",
        "a photo of a red object",
    ]


def test_what_is_not_the_object_is_grey() -> None:
    image = Image.new("RGB", (20, 10), (200, 0, 0))
    mask = np.zeros((10, 20), bool)
    mask[2:6, 4:8] = True
    cut = crop(image, Detection("cat", (3.4, 1.6, 9.0, 8.0), 1.0, mask=mask))
    assert cut.size == (6, 6)  # columns 3 to 8, rows 2 to 7, as PIL rounds
    pixels = np.asarray(cut)
    assert (pixels[0:4, 1:5] == (200, 0, 0)).all()
    assert (pixels[4:] == 0x99).all() and (pixels[:, 0] == 0x99).all() and (pixels[:, 5] == 0x99).all()
    assert (
        np.asarray(crop(image, Detection("cat", (3.4, 1.6, 9.0, 8.0), 1.0))).reshape(-1, 3).tolist()
        == [[200, 0, 0]] * 36
    )
    assert crop(image, Detection("cat", (3.0, 2.0, 3.2, 2.1), 1.0)).size == (1, 1)


def test_color_probabilities_by_the_formula_of_zero_shot_classification(tmp_path: Path) -> None:
    save_tiny_clip(tmp_path / "clip")
    classifier = ColorClassifier(f"local-dir:{tmp_path / 'clip'}", None, device="cpu")
    crops = pictures(3, (20, 30))
    encode = classifier.encoder
    expected = []
    for image, name in zip(crops, ("circle", "square", "circle"), strict=True):
        rows = []
        for color in COLORS:
            texts = encode.encode_texts(templates(color, name))
            mean = texts.mean(dim=0)
            rows.append(100 * (encode.encode_images([image])[0] @ (mean / mean.norm())))
        expected.append(torch.stack(rows).softmax(dim=0).tolist())
    found = classifier(crops, ["circle", "square", "circle"])
    assert [list(row) for row in found] == [list(COLORS)] * 3
    assert np.allclose([list(row.values()) for row in found], expected, atol=1e-4)
    assert classifier([], []) == []


def seen(name: str, confidence: float) -> Detection:
    return Detection(name, (0, 0, 9, 9), confidence, mask=np.ones((10, 10), bool))


def test_only_the_objects_that_are_asked_for_get_a_color() -> None:
    found = [seen("cat", 0.2), seen("dog", 0.9), seen("cat", 0.8), seen("cat", 0.5)]
    clause = {"class": "cat", "count": 2, "color": "red"}
    assert asked_for(found, {"include": [clause]}, OFFICIAL) == [2, 3]
    assert asked_for(found, {"include": [{**clause, "count": 1}]}, OFFICIAL) == [2]
    assert asked_for(found, {"include": [{"class": "cat", "count": 2}]}, OFFICIAL) == []
    # With suppression of overlaps the third cat counts for nothing, but `dense` looks at the raw ones.
    assert asked_for(found, {"include": [{**clause, "count": 3}]}, Limits(max_overlap=0.5)) == [0, 2, 3]


def test_the_reward_reads_colors_of_a_detector_that_leaves_them_open(tmp_path: Path) -> None:
    class Cats:
        classes = ("cat", "dog")
        colors_by_clip = True

        def __call__(self, images: list[Image.Image]) -> list[list[Detection]]:
            return [[seen("cat", 0.95), seen("dog", 0.95)] for _ in images]

    save_tiny_clip(tmp_path / "clip")
    reward = GenEval(
        Cats(), score="strict", color_kwargs={"model": f"local-dir:{tmp_path / 'clip'}", "pretrained": None}
    )
    images = pictures(6, (10, 10))
    assert reward.painter is not None
    colors = [max(row, key=lambda c: row[c]) for row in reward.painter(images, ["cat"] * 6)]
    include = [
        [{"class": "cat", "count": 1, "color": color}]
        for color in [*colors[:5], "red" if colors[5] != "red" else "blue"]
    ]
    verdicts = reward.judge(images, include=include)
    assert [verdict is not None and verdict.correct for verdict in verdicts] == [True] * 5 + [False]
    assert all(d.mask is None for verdict in verdicts if verdict for own in verdict.objects.values() for d in own)


# Thresholds -----------------------------------------------------------------------------------------------------------


def test_thresholds_of_the_official_evaluators_options() -> None:
    def cats(images: list[Image.Image]) -> list[list[Detection]]:
        return [[seen("cat", 0.6), seen("cat", 0.5)] for _ in images]

    counting = {"tag": ["counting"], "include": [[{"class": "cat", "count": 2}]]}
    single = {"tag": ["single_object"], "include": [[{"class": "cat", "count": 1}]]}
    image = pictures(1)

    def strict(columns: dict, **settings: float) -> float | None:
        return GenEval(cats, score="strict", **settings)(image, [""], **columns)[0]  # type: ignore[arg-type]

    assert strict(counting) == 0.0 and strict(single) == 1.0
    assert strict(counting, counting_threshold=0.4) == 1.0
    assert strict(counting, counting_threshold=0.4, max_overlap=0.9) == 0.0  # the two are one
    assert strict(single, threshold=0.7) == 0.0


# Self-test ------------------------------------------------------------------------------------------------------------


def test_a_detector_that_finds_nothing_is_found_before_the_run(folders: dict[str, str]) -> None:
    with pytest.raises(
        RewardError,
        match=r"reward 'geneval': the self-test found no known object on any of 8 pictures .*circle: 0.00.*; ring: 0.00.*"
        r"so every score would be 0; check the detector's model",
    ):
        load_reward("geneval", detector=f"{__file__}:Blind")
    load_reward("geneval", detector=f"{__file__}:Blind", self_test=False)
    load_reward("geneval")  # the shapes detector sees its shapes
    names = [name for _, names in Owlv2(folders["owlv2"], device="cpu").known() for name in names]
    assert names == ["stop sign", "traffic light", "clock", "donut"] and set(names) <= set(CLASSES)
    assert [names for _, names in Owlv2(folders["owlv2"], classes=["clock"], device="cpu").known()] == [["clock"]]


class Blind:
    def __call__(self, images: list[Image.Image]) -> list[list[Detection]]:
        return [[] for _ in images]

    def known(self) -> list:
        from rewards.detectors import ShapesDetector

        return ShapesDetector().known()


def test_pictures_of_ones_own_for_the_self_test(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "cat.png")
    lines = tmp_path / "known.jsonl"
    lines.write_text('{"image": "cat.png", "prompt": "a cat", "include": [{"class": "cat", "count": 1}]}\n\n')

    def seeing(name: str, confidence: float):
        return lambda images: [[seen(name, confidence)] for _ in images]

    GenEval(seeing("cat", 0.31), self_test=str(lines))
    for name, confidence in (("cat", 0.3), ("dog", 0.99)):
        with pytest.raises(RewardError, match=r"on any of 1 pictures with a confidence above 0.3 \(cat: 0.[03]0\)"):
            GenEval(seeing(name, confidence), self_test=str(lines))
    GenEval(seeing("cat", 0.2), self_test=str(lines), threshold=0.1)
    for text, message in (
        ('{"image": "gone.png", "include": []}', "line 1: expected .*FileNotFoundError"),
        ('{"include": []}', "line 1: expected .*KeyError: 'image'"),
        ("nonsense", "line 1: expected .*JSONDecodeError"),
        ("", "is empty"),
    ):
        lines.write_text(text)
        with pytest.raises(RewardError, match=message):
            GenEval(seeing("cat", 1.0), self_test=str(lines))
    with pytest.raises(RewardError, match="cannot be read"):
        GenEval(seeing("cat", 1.0), self_test=str(tmp_path / "none.jsonl"))
