"""Settings of `gcpo-t2i env`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class EnvConfig:
    """What a bug report should say about the machine."""

    json: bool = False
    """Print JSON instead of Markdown."""
