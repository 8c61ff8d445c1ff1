"""A model's folder by the name that a user gives: a path, or a repository of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from gcpo_t2i.errors import UserError

FILES = ["*.json", "*.safetensors", "*.jinja", "*.model"]  # no pickles, no code, nor the weights again in other formats
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def local_folder(name: str | Path) -> Path:
    """The folder itself, or that of the hub's repository `OWNER/NAME`, downloaded on first use.

    UserError names a repository that cannot be had, and how to get it.
    """
    path = Path(name)
    if path.exists() or not REPOSITORY.fullmatch(str(name)):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    get = f"hf download {name}"
    try:
        return Path(snapshot_download(str(name), allow_patterns=FILES))
    except GatedRepoError as error:
        raise UserError(
            f"model '{name}': its owner wants terms to be accepted, at https://huggingface.co/{name}; then: "
            f"hf auth login && {get}"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(f"no model folder at {name}, and no such repository on the Hugging Face hub") from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"no model folder at {name}; as a repository of the Hugging Face hub it is not in the cache, and the hub "
            f"cannot be reached; with a network: {get}"
        ) from error
    except OSError as error:
        raise UserError(f"model '{name}': {str(error).splitlines()[0]}; try: {get}") from error


def hub_folder(name: str, option: str) -> Path:
    """The folder of model `name`: itself if there is such a folder, else the hub's model of that id, downloaded if need be.

    UserError names `option`, the file, and the cure: no such model, a gated one, or no network.
    """
    from huggingface_hub import errors, snapshot_download

    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except errors.HFValidationError as error:
        raise UserError(
            f"{option}: no folder {name}, and the Hugging Face Hub has no such ids; name another"
        ) from error
    except errors.GatedRepoError as error:
        raise UserError(
            f"{option}: {name} is gated; accept its terms at huggingface.co/{name}, then log in with: hf auth login"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{option}: no folder {name}, and no such model at huggingface.co (or it is private: hf auth login)"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.IncompleteSnapshotError, errors.HfHubHTTPError) as error:
        raise UserError(
            f"{option}: config.json of {name} is not on this machine and cannot be downloaded; where there is network:"
            f" {download(name)}, then {option} {name.rpartition('/')[2]}"
        ) from error


def require_file(folder: Path, name: str, option: str, *patterns: str) -> None:
    """UserError that names the first pattern when `folder`, what `hub_folder` made of `name`, has no file of any of them."""
    if not any(file for pattern in patterns for file in folder.glob(pattern)):
        raise UserError(f"{option}: {folder} has no {patterns[0]}; get it with: {download(name)}")


def download(name: str) -> str:
    """The command that gets model `name`; of a local folder it is not known which model belongs there."""
    source, target = ("MODEL", name) if Path(name).is_dir() else (name, name.rpartition("/")[2])
    patterns = " ".join(f"--include '{pattern}'" for pattern in FILES)
    return f"hf download {source} {patterns} --local-dir {target}"
