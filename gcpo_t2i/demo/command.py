"""`gcpo-t2i demo`: the page, until Ctrl-C."""

from __future__ import annotations

import ipaddress

from rich.console import Console
from rich.markup import escape

from gcpo_t2i.config import DemoConfig
from gcpo_t2i.demo.page import build, serve
from gcpo_t2i.demo.studio import Studio
from gcpo_t2i.errors import UserError


def demo(config: DemoConfig) -> None:
    """Serves the page until it is ended. UserError for a model that is not there, or a port that is taken."""
    console = Console()
    if not is_local(config.host) and config.auth is None:
        console.print(
            f"[yellow]everybody who can reach {escape(config.host)} can use the demo; --auth asks for a password"
        )
    console.print(f"loading {escape(config.model)} …")
    studio = Studio(config)
    try:
        serve(build(studio), studio)
    except OSError as error:
        raise UserError(
            f"the demo cannot listen on {config.host}:{config.port or '7860 to 7959'}: the port is taken, or the address is not "
            "one of this machine; name another --port or --host"
        ) from error


def is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
