"""Prompts out of data sets (`hf:`), saved on this machine as `datasets` and the hub's repositories have them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from gcpo_t2i.data import Prompt, load_prompts
from gcpo_t2i.datasets_prompts import _parts
from gcpo_t2i.errors import UserError

ROWS = {
    "caption": ["a red circle", "a blue star"],
    "tag": ["colors", "colors"],
    "include": [[{"class": "circle", "count": 1}], [{"class": "star", "count": 1}]],
    "prompts": [1, 2],  # a reward's own parameter is called so
}


def fails(source: str) -> str:
    with pytest.raises(UserError) as caught:
        load_prompts(source)
    return str(caught.value)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert fails("hf:org/name") == (
        "prompts 'hf:org/name' need a package that is missing: pip install 'gcpo-t2i[datasets]'"
    )


def test_the_parts_of_a_source() -> None:
    assert _parts("hf:org/name") == ("org/name", "train", "prompt")
    assert _parts("hf:org/name:test") == ("org/name", "test", "prompt")
    assert _parts("hf:org/name::caption") == ("org/name", "train", "caption")
    for source in ("hf:", "hf:a:b:c:d"):
        with pytest.raises(UserError, match="expected hf:NAME, hf:NAME:SPLIT or hf:NAME:SPLIT:COLUMN"):
            _parts(source)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of `save_to_disk` with two splits, one with a single split, and a folder of parquet files."""
    datasets = pytest.importorskip("datasets")
    root = tmp_path_factory.mktemp("datasets")
    from PIL import Image

    table: dict[str, Any] = {**ROWS, "picture": [Image.new("RGB", (2, 2))] * 2, "raw": [b"\x00", b"\x01"]}
    features = datasets.Features(
        {
            "caption": datasets.Value("string"),
            "tag": datasets.ClassLabel(names=["colors", "counting"]),
            "include": datasets.List({"class": datasets.Value("string"), "count": datasets.Value("int64")}),
            "prompts": datasets.Value("int64"),
            "picture": datasets.Image(),
            "raw": datasets.Value("binary"),
        }
    )
    parts = {"train": slice(0, 2), "test": slice(1, 2)}
    splits = {
        name: datasets.Dataset.from_dict({key: values[part] for key, values in table.items()}, features=features)
        for name, part in parts.items()
    }
    datasets.DatasetDict(splits).save_to_disk(root / "two")
    splits["train"].save_to_disk(root / "one")
    (root / "hub" / "data").mkdir(parents=True)
    datasets.Dataset.from_dict({"prompt": ROWS["caption"], "goal": [0.5, None]}).to_parquet(
        root / "hub" / "data" / "train-00000-of-00001.parquet"
    )
    (root / "lines").mkdir()
    (root / "lines" / "train.jsonl").write_text(json.dumps({"prompt": "a cat"}) + "\n")
    return root


def test_splits_and_columns_of_a_saved_data_set(saved: Path) -> None:
    expected = [
        Prompt("a red circle", None, {"tag": "colors", "include": [{"class": "circle", "count": 1}]}),
        Prompt("a blue star", None, {"tag": "colors", "include": [{"class": "star", "count": 1}]}),
    ]
    prompts = load_prompts(f"hf:{saved / 'two'}::caption")
    assert prompts == expected and prompts[1].place == f"hf:{saved / 'two'}::caption, row 2"
    assert load_prompts(f"hf:{saved / 'two'}:test:caption") == expected[1:]
    assert load_prompts(f"hf:{saved / 'one'}::caption") == expected


def test_folders_as_the_hub_has_them(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    assert load_prompts(f"hf:{saved / 'hub'}") == [
        Prompt("a red circle", None, {"goal": 0.5}),
        Prompt("a blue star", None, {"goal": None}),
    ]
    assert load_prompts(f"hf:{saved / 'lines'}") == [Prompt("a cat")]


def test_what_is_not_there_is_named(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    two, hub = saved / "two", saved / "hub"
    assert f"no column 'prompt'; did you mean 'prompts'?; name the one with the texts: hf:{two}:train:COLUMN" in fails(
        f"hf:{two}"
    )
    assert "no split 'tests'; did you mean 'test'?" in fails(f"hf:{two}:tests:caption")
    assert "Unknown split" in fails(f"hf:{hub}:nope")
    import datasets

    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: datasets.Dataset.from_dict({"prompt": []}))
    assert "the split 'train' is empty; name another" in fails("hf:org/name")
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("no\nnetwork")))
    assert fails("hf:org/name") == (
        "prompts 'hf:org/name' cannot be loaded: no network; without a network it must be on this machine already: "
        "hf download --repo-type dataset org/name, or name a local folder"
    )
