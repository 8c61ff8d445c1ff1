"""The words of GenEval (github.com/djghosh13/geneval): COCO's 80 classes by the names that it gives them, and its colours."""

from __future__ import annotations

from collections.abc import Mapping

CLASSES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote"),
    *("computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock"),
    *("vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")

# COCO's and Pascal VOC's own names, as checkpoints have them, where GenEval's differ
ALIASES = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "mouse": "computer mouse",
    "pottedplant": "potted plant",
    "remote": "tv remote",
    "sofa": "couch",
    "tvmonitor": "tv",
}


def geneval_names(labels: Mapping[int, str]) -> tuple[str, ...]:
    """A checkpoint's labels (`config.id2label`) as GenEval names them, by index; other names stay as they are.

    80 labels without names (`LABEL_0` …) are COCO's, in its order.
    """
    names = [labels[index].lower().replace("_", " ").replace("-", " ") for index in sorted(labels)]
    if len(names) == len(CLASSES) and all(name.startswith("label ") for name in names):
        return CLASSES
    return tuple(ALIASES.get(name, name) for name in names)
