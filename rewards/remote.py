"""A reward on another machine: JSON over HTTP, images as PNG. `gcpo-t2i rewards serve` is the other side.

GET  /health        → {"rewards": {NAME: {"range": [low, high] or null, and "success": least where there is one}}}
POST /score/NAME    {"images": [PNG in base64, ...], "prompts": [...], "columns": {COLUMN: [...]}}
                    → {"scores": [number or null, ...]}, or with status 422 {"error": "what is wrong with the request"}
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Sequence
from typing import Any

import httpx
from PIL import Image

from rewards.errors import RewardError, did_you_mean

FIRST_WAIT, LONGEST_WAIT = 0.5, 16.0  # s between tries; each wait is twice the one before
RETRIED = (408, 425, 429, 500, 502, 503, 504)  # status codes that another try may mend
HEALTH_TIMEOUT = 10.0  # s


class Remote:
    """A reward that a server computes. Asks for the server's health when it is made: before the first step.

    url: of the server, such as http://127.0.0.1:8000. reward: its name there. timeout: seconds without an answer after which
    a request counts as failed. retries: tries after the first, for what may pass by: no connection, timeouts, and status
    codes of overload. batch_size: images per request.
    """

    def __init__(self, url: str, reward: str, timeout: float = 120.0, retries: int = 5, batch_size: int = 64) -> None:
        if not url.startswith(("http://", "https://")):
            raise RewardError(f"url {url!r} must start with http:// or https://")
        if timeout <= 0 or retries < 0 or batch_size < 1:
            raise RewardError(f"timeout {timeout:g} and batch_size {batch_size} must be > 0, retries {retries} >= 0")
        self.url, self.reward, self.retries, self.batch_size = url.rstrip("/"), reward, retries, batch_size
        # Rewards are served inside a cluster: a proxy for the way out of it must not see them.
        self.client = httpx.Client(timeout=timeout, trust_env=False)
        known = self._ask("GET", "/health", timeout=min(HEALTH_TIMEOUT, timeout)).get("rewards")
        if not isinstance(known, dict):
            raise RewardError(f"{self.url} answered, but not as a reward server does; check the address")
        if reward not in known:
            raise RewardError(f"{self.url} serves no reward {reward!r}{did_you_mean(reward, known)}")
        self.range = _range(known[reward])
        self.success = known[reward].get("success") if isinstance(known[reward], dict) else None

    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str], **columns: Sequence[Any]
    ) -> list[float | None]:
        scores: list[float | None] = []
        for start in range(0, len(images), self.batch_size):
            part = slice(start, start + self.batch_size)
            content = {
                "images": [to_base64(image) for image in images[part]],
                "prompts": list(prompts[part]),
                "columns": {name: list(values[part]) for name, values in columns.items()},
            }
            answer = self._ask("POST", f"/score/{self.reward}", content).get("scores")
            if not isinstance(answer, list) or len(answer) != len(content["images"]):
                number = len(content["images"])
                raise RewardError(f"{self.url} answered {str(answer)[:80]!r} instead of {number} scores")
            scores += answer
        return scores

    def _ask(self, method: str, path: str, content: Any = None, timeout: float | None = None) -> dict[str, Any]:
        """The server's answer. RewardError if there is none after all tries, if it refuses, or if it is no JSON object."""
        settings: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
        problem = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT))
            try:
                response = self.client.request(method, self.url + path, json=content, **settings)
            except httpx.TimeoutException:
                problem = f"no answer within {timeout or self.client.timeout.read:g} s"
                continue
            except httpx.TransportError as error:
                problem = str(error) or type(error).__name__
                continue
            except (TypeError, ValueError) as error:  # before anything was sent
                raise RewardError(f"these columns cannot be sent as JSON: {error}") from error
            if response.status_code not in RETRIED:
                return self._read(response)
            problem = f"status {response.status_code}: {response.text[:200]}"
        raise RewardError(
            f"the reward server {self.url} failed {self.retries + 1} times, last with: {problem}; is it up? "
            f"Try: curl {self.url}/health; start one with: gcpo-t2i rewards serve"
        )

    def _read(self, response: httpx.Response) -> dict[str, Any]:
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            said = " ".join(response.text.split())[:80]
            raise RewardError(f"{self.url} answered no JSON object (status {response.status_code}): {said!r}")
        if response.status_code != 200:
            reason = answer.get("error") or answer.get("detail") or answer
            raise RewardError(f"{self.url} refused (status {response.status_code}): {str(reason)[:300]}")
        return answer


def _range(described: Any) -> tuple[float, float] | None:
    bounds = described.get("range") if isinstance(described, dict) else None
    return (float(bounds[0]), float(bounds[1])) if bounds else None


def to_base64(image: Image.Image) -> str:
    """As PNG: the server sees the same pixels."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()
