"""Prompts out of data sets: of the Hugging Face hub, saved by `datasets` on this machine, or a folder of parquet files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gcpo_t2i.errors import UserError, did_you_mean

DATASET = "hf:"
SAVED = ("dataset_dict.json", "dataset_info.json")  # what `save_to_disk` leaves in a folder
RESERVED = ("images", "prompts")  # names of rewards' own parameters


def read_rows(source: str) -> Iterator[dict[str, Any]]:
    """Each row of `hf:NAME[:SPLIT[:COLUMN]]` with its text as `prompt`; the split is `train`, the column `prompt` by default.

    Other columns come along if they hold numbers, texts, or lists and mappings of those; pictures and sound do not, nor
    columns named `images` or `prompts`. Raises UserError for a missing package, data set, split or column.
    """
    name, split, column = _parts(source)
    rows = _loaded(source, name, split)
    if column not in rows.column_names:
        raise UserError(
            f"prompts '{source}': no column '{column}'{did_you_mean(column, rows.column_names)}; "
            f"name the one with the texts: {DATASET}{name}:{split}:COLUMN"
        )
    others = [
        key for key, kind in rows.features.items() if _is_plain(kind) and key not in (column, "prompt", *RESERVED)
    ]
    if not len(rows):
        raise UserError(f"prompts '{source}': the split '{split}' is empty; name another")
    named = {
        key: rows.features[key].int2str for key in others if hasattr(rows.features[key], "int2str")
    }  # class labels
    for row in rows.select_columns([column, *others]):
        texts = {key: name(row[key]) for key, name in named.items() if row[key] is not None}
        yield {"prompt": row[column], **{key: row[key] for key in others}, **texts}


def _parts(source: str) -> tuple[str, str, str]:
    name, split, column = (*source.removeprefix(DATASET).split(":"), "", "")[:3]
    if not name or source.count(":") > 3:
        raise UserError(
            f"prompts '{source}': expected {DATASET}NAME, {DATASET}NAME:SPLIT or {DATASET}NAME:SPLIT:COLUMN"
        )
    return name, split or "train", column or "prompt"


def _loaded(source: str, name: str, split: str) -> Any:
    try:
        import datasets  # an extra
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise UserError(
            f"prompts '{source}' need a package that is missing: pip install 'gcpo-t2i[datasets]'"
        ) from error
    folder = Path(name).expanduser()
    try:
        if any((folder / file).is_file() for file in SAVED):
            saved = datasets.load_from_disk(str(folder))
            if not isinstance(saved, datasets.DatasetDict):
                return saved  # one split, without a name
            if split not in saved:
                raise UserError(f"prompts '{source}': no split '{split}'{did_you_mean(split, map(str, saved))}")
            return saved[split]
        return datasets.load_dataset(str(folder) if folder.is_dir() else name, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"prompts '{source}' cannot be loaded: {reason}; without a network it must be on this machine already: "
            f"hf download --repo-type dataset {name}, or name a local folder"
        ) from error


def _is_plain(kind: Any) -> bool:
    """Whether a feature holds what JSON does: numbers, texts, and lists and mappings of them."""
    if isinstance(kind, dict):
        return all(map(_is_plain, kind.values()))
    if isinstance(kind, list):
        return all(map(_is_plain, kind))
    if hasattr(kind, "feature"):  # List, LargeList, Sequence
        return _is_plain(kind.feature)
    return type(kind).__name__ in ("Value", "ClassLabel") and "binary" not in str(kind.dtype)
