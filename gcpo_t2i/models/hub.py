"""A model's folder by the name that a user gives: a path, or a repository of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from gcpo_t2i.errors import UserError

FILES = ["*.json", "*.safetensors", "*.jinja"]  # no pickles and no code
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
