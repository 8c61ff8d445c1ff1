"""Rewards over HTTP: a real server on a free port, and servers that are down, die, hang or talk nonsense."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi.testclient import TestClient
from PIL import Image

import rewards.remote
from gcpo_t2i.cli import main
from gcpo_t2i.config import RewardConfig, RewardsServeConfig, TrainConfig, validate
from gcpo_t2i.config.base import ConfigError
from gcpo_t2i.data import Prompt
from gcpo_t2i.errors import UserError
from gcpo_t2i.rewards_serve import address, listen, make_app
from gcpo_t2i.scoring import RewardSet
from rewards import RewardError, load_reward
from rewards.remote import Remote, to_base64
from tests.reward_models import pictures
from tests.tiny import train_command

GENEVAL = RewardConfig("geneval", kwargs={"score": "strict"})


@contextmanager
def running(app: Any) -> Iterator[str]:
    """The app on a free port, in a thread."""
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


@pytest.fixture(scope="module")
def served(reward_file: Path) -> Iterator[tuple[str, RewardSet]]:
    local = RewardSet.load(
        [RewardConfig("clip"), GENEVAL, *(RewardConfig(f"{reward_file}:{n}") for n in ("nan", "broken"))], "cpu"
    )
    with running(make_app(local)) as url:
        yield url, local


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits between tries, which are not waited for."""
    asked: list[float] = []
    monkeypatch.setattr(rewards.remote.time, "sleep", asked.append)
    return asked


# A server that works --------------------------------------------------------------------------------------------------


def test_a_served_reward_says_what_the_local_one_says(served: tuple[str, RewardSet]) -> None:
    url, local = served
    images = pictures(5, (48, 48))
    include = [{"class": "star", "count": 1}]
    prompts = [Prompt("a photo of a star", None, {"tag": "single_object", "include": include})] * 4 + [
        Prompt("a blue ring")
    ]
    configs = [RewardConfig("remote", kwargs={"url": url + "/", "reward": name}) for name in ("clip", "geneval")]
    configs[0].kwargs["batch_size"] = 2  # three requests
    remote = RewardSet.load(configs, "cpu")
    assert list(remote.rewards) == ["remote/clip", "remote/geneval"]
    assert [reward.range for reward in remote.rewards.values()] == [(-1.0, 1.0), (0.0, 1.0)]
    expected = RewardSet({name: local.rewards[name] for name in ("clip", "geneval")}, {}).score(images, prompts)
    said = remote.score(images, prompts)
    assert said["remote/geneval"] == expected["geneval"] and said["remote/geneval"][4] is None
    assert said["remote/clip"] == pytest.approx(expected["clip"], abs=1e-6)
    assert remote.score([], []) == {"remote/clip": [], "remote/geneval": []}


def test_pixels_and_columns_arrive_as_they_are() -> None:
    got: dict[str, Any] = {}

    class Keep:
        def __call__(self, images: list, prompts: list, **columns: list) -> list[float]:
            got.update(images=images, prompts=prompts, columns=columns)
            return [1 / 3] * len(images)

    from rewards import Reward

    with running(make_app(RewardSet({"keep": Reward("keep", Keep())}, {"keep": 1.0}))) as url:
        images = pictures(2, (31, 17))
        assert Remote(url, "keep")(images, ["ä", "日"], goal=[{"x": [1, None]}, None]) == [1 / 3, 1 / 3]  # every bit
        assert [image.tobytes() for image in got["images"]] == [image.tobytes() for image in images]
        assert (got["prompts"], got["columns"]) == (["ä", "日"], {"goal": [{"x": [1, None]}, None]})
        with pytest.raises(RewardError, match="these columns cannot be sent as JSON"):
            Remote(url, "keep")(images, ["", ""], goal=[object(), 1])


def test_several_trainers_at_once(served: tuple[str, RewardSet]) -> None:
    url, _ = served
    images, prompts = pictures(3, (48, 48)), ["a photo of a star"] * 3
    expected, found = Remote(url, "clip")(images, prompts), []
    threads = [threading.Thread(target=lambda: found.append(Remote(url, "clip")(images, prompts))) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join(30) for thread in threads]
    assert found == [expected] * 4


def test_what_is_wrong_with_a_reward_there_is_told_here(served: tuple[str, RewardSet], waits: list[float]) -> None:
    url, _ = served
    for name, reason in (
        ("nan", "returned nan for image 0: not finite"),
        ("broken", "RuntimeError: the GPU caught fire"),
    ):
        with pytest.raises(RewardError, match=rf"refused \(status 422\): reward .*{reason}"):
            Remote(url, name)(pictures(1), [""])
    unknown = {"include": [[{"class": "dog", "count": 1}]]}
    with pytest.raises(RewardError, match="the detector knows no class 'dog'"):
        Remote(url, "geneval")(pictures(1, (48, 48)), [""], **unknown)
    assert waits == []  # another try would say the same
    with pytest.raises(RewardError, match=r"serves no reward 'clipp'; did you mean 'clip'\?"):
        Remote(url, "clipp")


def test_requests_that_are_not_right_are_refused(served: tuple[str, RewardSet]) -> None:
    client = TestClient(make_app(served[1]))
    png = to_base64(Image.new("RGB", (4, 4)))
    jpeg = base64.b64encode(b"\xff\xd8\xff\xe0 nothing").decode()

    def said(**content: Any) -> str:
        answer = client.post("/score/clip", json={"images": [png], "prompts": ["a"]} | content)
        assert answer.status_code == 422
        return answer.text

    assert "prompts has 2 entries for 1 images" in said(prompts=["a", "b"])
    assert "goal has 0 entries for 1 images" in said(columns={"goal": []})
    assert "rename the column 'images'" in said(columns={"images": [1]})
    assert "image 0 is no PNG in base64" in said(images=["%%%"])
    assert "image 0 is no PNG in base64" in said(images=[jpeg])
    assert "image 1 is no PNG" in said(images=[png, png[:40]], prompts=["a", "b"])
    assert "1025 images in one request; 1024 are the most" in said(images=[png] * 1025, prompts=["a"] * 1025)
    assert "more than 16,777,216" in said(images=[to_base64(Image.new("RGB", (5000, 4000)))])
    assert "prompts" in said(prompts=3)
    assert client.post("/score/none", json={"images": [], "prompts": []}).status_code == 404
    assert client.get("/health").json()["rewards"]["clip"] == {"range": [-1.0, 1.0]}


# Servers that do not --------------------------------------------------------------------------------------------------


@contextmanager
def answering(*answers: Any) -> Iterator[tuple[str, list[str]]]:
    """A server that gives these answers in turn, then the last one for ever: (status, text), or seconds to be silent."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            now = answers[min(len(asked), len(answers) - 1)]
            asked.append(self.path)
            if isinstance(now, float):
                threading.Event().wait(now)  # time.sleep may be replaced
                return
            body = now[1].encode()
            self.send_response(now[0])
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = answer

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


HEALTHY = (200, '{"rewards": {"r": {"range": null}}}')


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_server_that_is_down_at_the_start_is_named_with_the_cure(waits: list[float]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(
        RewardError,
        match=rf"reward 'remote': the reward server {url} failed 6 times, last with: .*refused; is it up\? "
        rf"Try: curl {url}/health; start one with: gcpo-t2i rewards serve",
    ):
        load_reward("remote", url=url, reward="clip")
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0]  # each twice the one before, and no more tries than asked for


def test_waits_are_bounded(waits: list[float]) -> None:
    with pytest.raises(RewardError, match="failed 9 times"):
        Remote(f"http://127.0.0.1:{free_port()}", "r", retries=8)
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 16.0, 16.0]


def test_overload_is_waited_for(waits: list[float]) -> None:
    with answering(HEALTHY, (503, "busy"), (429, "busy"), (200, '{"scores": [0.25]}')) as (url, asked):
        assert Remote(url, "r")(pictures(1), [""]) == [0.25]
        assert waits == [0.5, 1.0] and asked == ["/health", "/score/r", "/score/r", "/score/r"]


def test_a_server_that_hangs_is_given_up(waits: list[float]) -> None:
    with answering(HEALTHY, 1.0) as (url, _):
        started = time.perf_counter()
        with pytest.raises(RewardError, match=r"failed 2 times, last with: no answer within 0\.2 s"):
            Remote(url, "r", timeout=0.2, retries=1)(pictures(1), [""])
        assert time.perf_counter() - started < 60
        assert waits == [0.5]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, "<html>Welcome to nginx!</html>"), r"answered no JSON object \(status 200\): '<html>Welcome to nginx!"),
        ((404, '{"detail": "Not Found"}'), r"refused \(status 404\): Not Found"),
        ((200, "[0.5]"), "answered no JSON object"),
        ((200, '{"scores": [0.5, 0.5]}'), r"answered '\[0.5, 0.5\]' instead of 1 scores"),
        ((200, '{"scores": "many"}'), "answered 'many' instead of 1 scores"),
        ((200, "{}"), "answered 'None' instead of 1 scores"),
        ((200, '{"scores": [NaN]}'), "returned nan for image 0: not finite"),
        ((200, '{"scores": ["good"]}'), "returned 'good' for image 0: not a number"),
        ((200, '{"scores": [7]}'), r"returned 7 for image 0: outside its range \[0, 1\]"),
        ((200, '{"scores": [0.5'), "answered no JSON object"),
    ],
)
def test_garbage_is_an_error_at_once(answer: tuple[int, str], message: str, waits: list[float]) -> None:
    healthy = (200, '{"rewards": {"r": {"range": [0, 1]}}}')
    with answering(healthy, answer) as (url, _):
        remote = RewardSet.load([RewardConfig("remote", kwargs={"url": url, "reward": "r"})])
        with pytest.raises(UserError, match=message):
            remote.score(pictures(1), [Prompt("")])
    assert waits == []


def test_what_is_no_reward_server_is_told_at_the_start(waits: list[float]) -> None:
    for answer in ((200, '{"status": "ok"}'), (200, '{"rewards": ["r"]}')):
        with answering(answer) as (url, _), pytest.raises(RewardError, match="but not as a reward server does"):
            Remote(url, "r")
    with pytest.raises(RewardError, match=r"url 'localhost:8000' must start with http:// or https://"):
        Remote("localhost:8000", "r")
    with pytest.raises(RewardError, match="timeout 0 and batch_size 64 must be > 0"):
        Remote("http://localhost:8000", "r", timeout=0)


def train_with(tiny_folder: Path, reward_file: Path, folder: Path, url: str) -> list[str]:
    """A run of 2 × 4 images per step that trains on the reward `r` of a server, and on nothing else there."""
    settings = {"url": url, "reward": "r", "timeout": 0.2, "retries": 1}
    reward = json.dumps([{"name": "remote", "kwargs": settings}])
    options = ["--rewards", reward, "--monitor.rewards", "[]", "--save_every", "0"]
    return [*train_command(tiny_folder, reward_file, folder), *options]


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ((503, "gone"), "failed 2 times, last with: status 503: gone"),
        (1.0, "failed 2 times, last with: no answer within 0.2 s"),
        ((200, "<html>"), "answered no JSON object (status 200): '<html>'"),
    ],
    ids=["dies", "hangs", "garbage"],
)
def test_a_server_that_fails_at_step_3_ends_the_run_with_a_checkpoint(
    trouble: Any, message: str, tiny_folder: Path, reward_file: Path, tmp_path: Path, waits: list[float], capsys: Any
) -> None:
    scores = (200, json.dumps({"scores": [i / 8 for i in range(8)]}))
    with answering(HEALTHY, scores, scores, trouble) as (url, _):
        assert main(train_with(tiny_folder, reward_file, tmp_path, url)) == 2
    told = capsys.readouterr().err.strip()
    assert message in told and "stopped after step 2; go on with: gcpo-t2i train" in told and told.count("\n") == 0
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_server_that_is_down_ends_the_run_before_it_starts(
    tiny_folder: Path, reward_file: Path, tmp_path: Path, waits: list[float], capsys: Any
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert main(train_with(tiny_folder, reward_file, tmp_path, url)) == 2
    assert f"the reward server {url} failed 2 times" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# Settings -------------------------------------------------------------------------------------------------------------


def remote(reward: str, port: int = 1) -> RewardConfig:
    return RewardConfig("remote", kwargs={"url": f"http://localhost:{port}", "reward": reward})


def test_several_remote_rewards_have_names_of_their_own() -> None:
    validate(TrainConfig(rewards=[remote("clip"), remote("hps")]))
    with pytest.raises(ConfigError, match="'remote/clip' is there twice"):
        validate(TrainConfig(rewards=[remote("clip"), remote("clip", port=2)]))


def test_serving_needs_a_reward_and_an_address(capsys: pytest.CaptureFixture[str]) -> None:
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["rewards", "serve", "--port", str(port), "--device", "cpu"]) == 2
        assert (
            f"cannot listen at 127.0.0.1:{port} (Address already in use); choose another with --port"
            in capsys.readouterr().err
        )
    with pytest.raises(ConfigError, match="at least one is needed"):
        validate(RewardsServeConfig(rewards=[]))
    with pytest.raises(ConfigError, match="port must be at most 65535"):
        validate(RewardsServeConfig(port=70000))
    assert RewardsServeConfig().host == "127.0.0.1"
    assert address("127.0.0.1", 80) == "http://127.0.0.1:80" and address("::1", 80) == "http://[::1]:80"
    assert address("0.0.0.0", 80) == f"http://{socket.gethostname()}:80"


def test_the_printed_settings_are_those_of_a_trainer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: None)
    assert main(["rewards", "serve", "--port", "0", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("serving geneval at http://127.0.0.1:")
    printed = RewardConfig(**json.loads(lines[1]))
    assert (printed.name, printed.kwargs["reward"]) == ("remote", "geneval") and printed.kwargs["url"] in lines[0]
