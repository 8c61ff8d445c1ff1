"""Models of the Hugging Face Hub, by id or as a local folder."""

from __future__ import annotations

from pathlib import Path

from gcpo_t2i.errors import UserError

PATTERNS = ("*.json", "*.safetensors", "*.model")  # no pickles, nor the weights again in other formats


def hub_folder(name: str, option: str) -> Path:
    """The folder of model `name`: itself if there is such a folder, else the hub's model of that id, downloaded if need be.

    UserError names `option`, the file, and the cure: no such model, a gated one, or no network.
    """
    from huggingface_hub import errors, snapshot_download

    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=list(PATTERNS)))
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
    patterns = " ".join(f"--include '{pattern}'" for pattern in PATTERNS)
    return f"hf download {source} {patterns} --local-dir {target}"
