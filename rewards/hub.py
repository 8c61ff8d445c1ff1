"""Models by the id of the Hugging Face hub or by a local folder: what is missing is named, with the line that gets it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rewards.errors import RewardError


def hub_file(repo: str, file: str) -> Path:
    """Where a file of `repo` (a folder, or an id such as org/name) lies on this machine; downloaded if it must be.

    RewardError, with the cure, if the folder lacks it, the id is none, the model is gated, or there is no network.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.errors import RepositoryNotFoundError as NotFound

    if Path(repo).expanduser().is_dir():
        path = Path(repo).expanduser() / file
        if not path.is_file():
            raise RewardError(f"the folder '{repo}' has no file {file}; was the model saved in another format?")
        return path
    try:
        return Path(hf_hub_download(repo, file))
    except HFValidationError as error:
        raise RewardError(f"'{repo}' is neither a folder nor an id of the Hugging Face hub (org/name)") from error
    except GatedRepoError as error:
        raise RewardError(
            f"'{repo}' is gated: accept its terms at https://huggingface.co/{repo}, then: "
            f"hf auth login && hf download {repo} {file}"
        ) from error
    except NotFound as error:
        raise RewardError(f"'{repo}' is not on the Hugging Face hub, or is private; check its name") from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise RewardError(
            f"{file} of '{repo}' is not on this machine and cannot be downloaded; where there is a network: {cure(repo)}"
        ) from error
    except EntryNotFoundError as error:
        raise RewardError(f"'{repo}' has no file {file}; is it such a model?") from error


def cure(repo: str) -> str:
    """The line that downloads a model, and what else would do."""
    return f"hf download {repo}  (or name a local folder that holds it)"


def pretrained(kind: Any, repo: str) -> Any:
    """`kind.from_pretrained(repo)` in float32, without gradient, for evaluation; never with weights made up.

    transformers fills weights that a checkpoint lacks with random ones and goes on: here they are an error.
    """
    hub_file(repo, "config.json")
    model, info = loaded(kind, repo, dtype="float32", output_loading_info=True)
    weights = dict(model.named_parameters())
    mismatched = [key[0] if isinstance(key, tuple) else key for key in info.get("mismatched_keys", ())]
    if lacking := sorted({key for key in (*info["missing_keys"], *mismatched) if key in weights}):
        raise RewardError(
            f"'{repo}' lacks {len(lacking)} of the weights of {type(model).__name__}, such as {lacking[0]}; "
            "it is a checkpoint of another kind"
        )
    return model.eval().requires_grad_(False)


def processor(kind: Any, repo: str) -> Any:
    """`kind.from_pretrained(repo)` of an image processor or a processor of images and text."""
    if not Path(repo).is_dir():
        hub_file(repo, "preprocessor_config.json")
    return loaded(kind, repo)


def loaded(kind: Any, repo: str, **settings: Any) -> Any:
    """`kind.from_pretrained(repo, ...)`; what transformers raises becomes a RewardError of one line."""
    try:
        return kind.from_pretrained(repo, **settings)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        get = "" if Path(repo).is_dir() else f"; if a file is missing: {cure(repo)}"
        raise RewardError(f"'{repo}' cannot be loaded as {kind.__name__}: {reason}{get}") from error
