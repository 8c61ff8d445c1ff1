"""Which versions of TRL the trainer is tested with: it overrides methods that TRL does not promise to keep."""

from __future__ import annotations

import importlib.metadata

from packaging.specifiers import SpecifierSet

from gcpo_t2i.errors import UserError

TESTED = ">=1.14.2,!=1.15.*,<1.17"  # pyproject.toml has the same; 1.15 cannot train on a machine without a GPU


def check_trl() -> None:
    """UserError if trl is not installed, or its version is not a tested one."""
    cure = "pip install 'gcpo-t2i[cot]'"
    try:
        installed = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"training on texts needs trl, which is not installed; {cure}") from error
    if not SpecifierSet(TESTED).contains(installed, prereleases=True):
        raise UserError(f"trl {installed} is installed, and the trainer is tested with trl {TESTED}; {cure}")
