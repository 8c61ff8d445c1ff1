"""`gcpo-t2i rewards serve`: rewards over HTTP, for any number of trainers that use `remote` (see `rewards.remote`)."""

from __future__ import annotations

import base64
import binascii
import io
import json
import socket
import threading
from collections.abc import Sequence
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape

from gcpo_t2i import __version__
from gcpo_t2i.config import RewardsServeConfig
from gcpo_t2i.data import RESERVED_COLUMNS, Prompt
from gcpo_t2i.errors import UserError
from gcpo_t2i.run import resolve_device
from gcpo_t2i.scoring import RewardSet

MAX_IMAGES = 1024  # of a request
MAX_PIXELS = 4096 * 4096  # of an image: a small PNG may hold very many


class ScoreRequest(BaseModel):
    """`images`: PNG in base64; columns as long as them."""

    images: list[str]
    prompts: list[str]
    columns: dict[str, list[Any]] = {}


def serve(config: RewardsServeConfig) -> None:
    """Serves until it is stopped. UserError for rewards that cannot be loaded and an address that cannot be had."""
    console = Console()
    listener = listen(config.host, config.port)  # before models are loaded for minutes in vain
    with listener:
        rewards = RewardSet.load(config.rewards, str(resolve_device(config.device)))
        url = address(*listener.getsockname()[:2])
        names = escape(", ".join(rewards.rewards))
        console.print(f"[bold]serving {names}[/] at {url}; Ctrl-C stops. For a trainer's rewards:", soft_wrap=True)
        for name in rewards.rewards:
            row = {"name": "remote", "kwargs": {"url": url, "reward": name}}
            console.print(f"  {escape(json.dumps(row))}", soft_wrap=True, highlight=False)
        app = make_app(rewards)
        uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A socket at this address. UserError if it is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UserError(
            f"cannot listen at {host}:{port} ({error.strerror or error}); choose another with --port or --host"
        ) from error
    return listener


def address(host: str, port: int) -> str:
    """What a trainer calls the server; where it listens at all addresses, by the name of this machine."""
    host = socket.gethostname() if host in ("0.0.0.0", "::") else host
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def make_app(rewards: RewardSet) -> FastAPI:
    """The two addresses. Requests are scored one after another: their models share one device."""
    app = FastAPI(title="gcpo-t2i rewards", version=__version__)
    turn = threading.Lock()
    described = {
        name: {"range": reward.range} | ({} if reward.success is None else {"success": reward.success})
        for name, reward in rewards.rewards.items()
    }

    @app.get("/health")
    def health() -> dict[str, Any]:
        return {"version": __version__, "rewards": described}

    @app.post("/score/{name:path}")
    def score(name: str, request: ScoreRequest) -> JSONResponse:
        if name not in rewards.rewards:
            return refuse(f"no reward {name!r} here; there are: {', '.join(rewards.rewards)}", 404)
        one = RewardSet({name: rewards.rewards[name]}, {name: 1.0})
        try:
            images, prompts = read_images(request.images), read_prompts(request)
            with turn:
                return JSONResponse({"scores": one.score(images, prompts)[name]})
        except UserError as error:
            return refuse(str(error))

    return app


def refuse(reason: str, status: int = 422) -> JSONResponse:
    return JSONResponse({"error": reason}, status_code=status)


def read_images(encoded: Sequence[str]) -> list[Image.Image]:
    """UserError, with the image's index, for what is no PNG in base64."""
    if len(encoded) > MAX_IMAGES:
        raise UserError(f"{len(encoded)} images in one request; {MAX_IMAGES} are the most, lower batch_size")
    images = []
    for index, text in enumerate(encoded):
        try:
            image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"])
            if image.width * image.height > MAX_PIXELS:
                raise UserError(f"image {index} has {image.width} x {image.height} px, more than {MAX_PIXELS:,} in all")
            images.append(image.convert("RGB"))
        except (binascii.Error, UnidentifiedImageError, OSError, SyntaxError) as error:
            raise UserError(f"image {index} is no PNG in base64: {error}") from error
    return images


def read_prompts(request: ScoreRequest) -> list[Prompt]:
    """UserError for lists of different lengths, and for columns by the names of a reward's own parameters."""
    number = len(request.images)
    for name, values in {"prompts": request.prompts, **request.columns}.items():
        if len(values) != number:
            raise UserError(f"{name} has {len(values)} entries for {number} images")
    if reserved := [name for name in RESERVED_COLUMNS if name in request.columns]:
        raise UserError(f"rename the column {reserved[0]!r}, rewards use that name for their own input")
    rows = ({name: values[i] for name, values in request.columns.items()} for i in range(number))
    return [Prompt(text, None, columns) for text, columns in zip(request.prompts, rows, strict=True)]
