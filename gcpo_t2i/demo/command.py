"""`gcpo-t2i demo`: the page, until Ctrl-C."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape

from gcpo_t2i.config import DemoConfig
from gcpo_t2i.demo.page import build, serve
from gcpo_t2i.demo.studio import Studio
from gcpo_t2i.errors import UserError


def demo(config: DemoConfig) -> None:
    """Serves the page until it is ended. UserError for a model that is not there, or a port that is taken."""
    console = Console()
    with listening(config):
        check_address(config.host, config.port)  # before the model is loaded
    if not is_local(config.host) and config.auth is None:
        console.print(
            f"[yellow]everybody who can reach {escape(config.host)} can use the demo; --auth asks for a password"
        )
    console.print(f"loading {escape(config.model)} …")
    studio = Studio(config)
    page = build(studio)
    with listening(config):
        serve(page, studio)


@contextmanager
def listening(config: DemoConfig) -> Iterator[None]:
    """Says in a line what the operating system has against an address."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the demo cannot listen on {config.host}:{config.port or '7860 to 7959'}: the port is taken, or the address is "
            "none of this machine; name another --port or --host"
        ) from error


def check_address(host: str, port: int | None) -> None:
    """OSError for an address that cannot be listened on; None: any port."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port or 0))


def is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
