"""A model's folder by the name that a user gives: a path, or a repository of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from gcpo_t2i.errors import UserError

FILES = ["*.json", "*.safetensors", "*.jinja", "*.model"]  # no pickles, no code, nor the weights again in other formats
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def local_folder(name: str | Path, option: str = "--model") -> Path:
    """The folder itself, or that of the hub's repository `OWNER/NAME`, downloaded on first use.

    UserError names `option`, a repository that cannot be had, and how to get it: no such one, a gated one, or no network.
    """
    path = Path(name)
    if path.exists() or not REPOSITORY.fullmatch(str(name)):
        return path
    from huggingface_hub import errors, snapshot_download

    get = download(str(name))
    try:
        return Path(snapshot_download(str(name), allow_patterns=FILES))
    except errors.GatedRepoError as error:
        raise UserError(
            f"{option}: the owner of {name} wants terms to be accepted, at https://huggingface.co/{name}; then: "
            f"hf auth login && {get}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{option}: no folder {name}, and no such repository on the Hugging Face hub (or it is private: hf auth login)"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"{option}: no folder {name}; config.json of that repository of the Hugging Face hub is not on this machine, "
            f"and the hub cannot be reached; where there is a network: {get}, then {option} {path.name}"
        ) from error
    except OSError as error:
        raise UserError(f"{option}: {name}: {str(error).splitlines()[0]}; try: {get}") from error


def require_file(folder: Path, name: str, option: str, *patterns: str) -> None:
    """UserError that names the first pattern when `folder`, what `local_folder` made of `name`, has no file of any of them."""
    if not any(file for pattern in patterns for file in folder.glob(pattern)):
        raise UserError(f"{option}: {folder} has no {patterns[0]}; get it with: {download(name)}")


def download(name: str) -> str:
    """The command that gets model `name`; of a local folder it is not known which model belongs there."""
    source, target = ("MODEL", name) if Path(name).is_dir() else (name, name.rpartition("/")[2])
    patterns = " ".join(f"--include '{pattern}'" for pattern in FILES)
    return f"hf download {source} {patterns} --local-dir {target}"
