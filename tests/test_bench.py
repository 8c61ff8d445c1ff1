"""The bench: what its numbers are of, that its rivals do the same work, and that its tables and files hold them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gcpo_t2i.bench import command, contest, log_probs, rivals, roofline, scaling, shapes, workload
from gcpo_t2i.bench.contest import Result
from gcpo_t2i.bench.memory import TensorMemory
from gcpo_t2i.bench.roofline import Load
from gcpo_t2i.bench.shapes import Shape
from gcpo_t2i.cli import main
from gcpo_t2i.models.policy import Condition

CPU = torch.device("cpu")
TINY = Shape("janus", dim=32, layers=2, heads=2, mlp_dim=48, side=4, codes=64, vq_channels=32, vq_scale=8)
TEXTS = ["a photo of a red circle", "two blue square"]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--shape small_janus` is a far smaller one, measured once, and memory is not copied for long."""
    for module in (shapes, command, workload):
        monkeypatch.setitem(module.SHAPES, "small_janus", TINY)
    monkeypatch.setattr(roofline, "COPIED", {"cpu": 1 << 16})
    monkeypatch.setattr(scaling, "GROUPS", (2,))
    monkeypatch.setattr(scaling, "SIDES", (3, 4))
    monkeypatch.setattr(scaling, "VOCABULARIES", (64, 96))
    monkeypatch.setattr(scaling, "WIDTHS", (1.0,))
    monkeypatch.setattr(log_probs, "LENGTH", 8)
    monkeypatch.setattr(log_probs, "CODES", 64)


def conditions(policy: Any) -> tuple[Condition, Condition]:
    cond = policy.condition(TEXTS)
    return cond, policy.condition([None, None], like=cond)


@pytest.mark.parametrize("family", ["janus", "llamagen"])
def test_a_random_policy_is_always_the_same_and_has_its_sizes(family: str) -> None:
    shape = replace(TINY, family=family, caption_tokens=12)
    policy, again = (shapes.random_policy(shape, CPU) for _ in range(2))
    config = policy.trunk.config
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (32, 2, 48)
    assert policy.grid == (4, 4) and policy.head(torch.zeros(1, 32)).shape == (1, 64)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), again.parameters(), strict=True))
    cond, null = conditions(policy)
    rollout = policy.sample(cond, null, group=2, guidance=5.0)
    assert policy.decode(rollout.tokens)[0].size == (32, 32)
    assert (policy.logp(cond.repeat_interleave(2), rollout.tokens).logp - rollout.cond_logp).abs().max() < 1e-4


def test_published_shapes() -> None:
    """Parameters of the trunk's layers by hand: 4 D² + 3 D M + 2 D each."""
    for name, millions in (("janus_pro_1b", 1233), ("janus_pro_7b", 6072), ("llamagen_xl", 731)):
        policy = shapes.random_policy(shapes.SHAPES[name], torch.device("meta"))
        shape = shapes.SHAPES[name]
        each = 4 * shape.dim**2 + 3 * shape.dim * shape.mlp_dim + 2 * shape.dim
        assert sum(weight.numel() for weight in policy.trunk.layers.parameters()) == shape.layers * each
        assert round(shape.layers * each / 1e6) == millions


def test_wider_keeps_the_width_of_heads() -> None:
    assert TINY.wider(2.0) == replace(TINY, dim=64, heads=4, mlp_dim=96)
    assert TINY.wider(0.5) == replace(TINY, dim=16, heads=1, mlp_dim=24)


# ---- rivals


def test_rivals_draw_codes_that_the_engine_could_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the most likely code in the place of a random one, all three are the same function of the weights."""
    policy = shapes.random_policy(TINY, CPU)
    with torch.no_grad():  # logits that differ
        policy.model.model.generation_head.vision_head.weight *= 50
        policy.model.model.generation_embeddings.weight *= 20
    cond, null = conditions(policy)
    ours = policy.sample(cond, null, group=2, guidance=5.0, top_k=1).tokens
    most_likely = lambda probs, num_samples: probs.argmax(-1, keepdim=True)  # noqa: E731
    monkeypatch.setattr(torch, "multinomial", most_likely)
    wide, wide_null = cond.repeat_interleave(2), null.repeat_interleave(2)
    assert len(set(map(tuple, ours.tolist()))) == 2
    assert torch.equal(rivals.plain_rollout(policy, wide, wide_null, 5.0), ours)
    assert torch.equal(rivals.library_rollout(rivals.library_model(policy, lower=False), wide, 5.0), ours)


def test_plain_scores_are_those_of_the_policy() -> None:
    policy = shapes.random_policy(TINY, CPU)
    cond, _ = conditions(policy)
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    plain = rivals.PlainScores(policy)
    assert plain.grid == (4, 4)
    torch.testing.assert_close(plain.logp(cond, tokens).logp, policy.logp(cond, tokens).logp)


def test_library_defaults_are_given_back() -> None:
    policy = shapes.random_policy(TINY, CPU)
    policy.trunk.set_attn_implementation("eager")
    before = torch.get_float32_matmul_precision()
    with rivals.library_defaults(policy):
        assert torch.get_float32_matmul_precision() == "highest"
        assert policy.trunk.config._attn_implementation == "sdpa"
    assert torch.get_float32_matmul_precision() == before
    assert policy.trunk.config._attn_implementation == "eager"


# ---- what is counted


def test_the_load_by_hand() -> None:
    """2 layers of 32² × 4 + 3 × 32 × 48 + 2 × 32, a head of 32 × 32 + 32 and 32 × 64 + 64; 6 rows after 5 positions."""
    load = roofline.load_of(shapes.random_policy(TINY, CPU), rows=6, prefix=5, size=4)
    inner, outer = 2 * (4 * 32**2 + 3 * 32 * 48 + 2 * 32), 32 * 32 + 32 + 32 * 64 + 64
    filled = sum(range(6, 21))  # 5 + 1 positions in use at the first step, 5 + 15 at the last
    assert load.positions == 15
    assert load.bytes == 15 * 4 * (inner + outer) + 6 * filled * 2 * 2 * 32 * 4  # keys and values of 2 layers
    attention = filled * 2 * 2 * 2 * 32  # 2 layers; scores and values; multiply and add
    assert load.operations == 6 * (15 * 2 * (inner + outer) + attention)
    assert load.logits == 6 * 15 * 64
    assert load.update_operations == 3 * 3 * (20 * 2 * (inner + outer) + attention)  # 3 images, forward and twice back
    assert load.update_scores == 3 * 2 * 2 * filled  # 2 layers of 2 heads


def test_a_ring_by_hand() -> None:
    assert scaling.communication(1e9, 1) == 0
    assert scaling.communication(450e9, 8) == pytest.approx(2 * 7 / 8)
    assert scaling.communication(50e9, 64) == pytest.approx(2 * 63 / 64)  # over the link between nodes


def test_the_model_finds_the_coefficients_that_made_the_seconds() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(8):
        size = (torch.rand(6, generator=generator, dtype=torch.float64) + 0.01).tolist()
        load = Load(
            int(1000 * size[0]), 1e9 * size[1], 1e12 * size[2], 1e9 * size[3], 1e12 * size[4], 1e9 * size[5], 0.0
        )
        rollout = 2e-10 * load.bytes + 3e-12 * load.operations + 1e-4 * load.positions + 4e-9 * load.logits
        update = 5e-12 * load.update_operations + 6e-9 * load.update_scores
        rows.append(scaling.Row("group", 1, 1, load, rollout, update, 0))
    model = scaling.fitted(rows)
    assert model.of_rollout == pytest.approx((2e-10, 3e-12, 1e-4, 4e-9), rel=1e-6)
    assert model.of_update == pytest.approx((5e-12, 6e-9), rel=1e-6)
    assert model.step(rows[0].load, 1) == pytest.approx(rows[0].rollout + rows[0].update)


@pytest.mark.usefixtures("tiny")
def test_sizes_that_do_not_fit_are_refused_before_any_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """2 layers of width 32 in float32, keys and values of 2 branches of 4 images of 16 codes after the prompt: one block."""
    monkeypatch.setattr(scaling, "free_memory", lambda device: 4 * 2 * 2 * 2 * 32 * 32 * 4 - 1)
    monkeypatch.setattr(scaling, "_row", None)
    options = ["--shape", "small_janus", "--prompts", "2", "--group_size", "2", "--what", "scaling", "--device", "cpu"]
    assert main(["bench", *options]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert (
        "scaling: keys and values of 4 images of 16 codes take 0.00 GB, 0.00 GB are free; lower --prompts (now 2)"
        in shown
    )


# ---- measuring


def test_ways_run_in_turns_and_the_median_is_kept() -> None:
    calls: list[str] = []
    seconds = {"a": iter([9.0, 9.0, 3.0, 1.0, 2.0]), "b": iter([9.0, 9.0, 5.0, 5.0, 8.0])}

    def way(name: str) -> Any:
        def run() -> contest.Phases:
            calls.append(name)
            return {"phase": next(seconds[name])}

        return run

    ticks: list[int] = []
    results = contest.in_turns({name: way(name) for name in "ab"}, 3, CPU, lambda: ticks.append(1))
    assert "".join(calls) == "aabb" + "ab" * 3 and len(ticks) == 8
    assert (results["a"].total, results["b"].total) == (2.0, 5.0)  # without the first times


def test_memory_of_tensors_by_hand() -> None:
    """Of 1000 numbers each: the sum and its square root at once, then the root and one row; weights and views are not new."""
    given = torch.ones(1000)

    def way() -> contest.Phases:
        given.mul_(1.0)
        root = (given + 1).sqrt()
        root.view(10, 100)[0].add_(1)
        assert len(torch.cat([root, root[:100]])) == 1100
        return {"phase": 1.0}

    phases, peak = contest.counted(way, CPU)
    assert (phases, peak) == ({"phase": 1.0}, 4 * 2100)


def test_memory_that_a_backward_pass_holds() -> None:
    """exp keeps its result for its gradient; beside it there are the gradients of sum (one number) and of exp."""
    weight = torch.ones(1000, requires_grad=True)

    def way() -> contest.Phases:
        weight.exp().sum().backward()
        return {}

    _, peak = contest.counted(way, CPU)
    assert peak == 4 * (1000 + 1 + 1 + 1000)
    with TensorMemory() as held:
        kept = weight.detach() + 1
    assert held.now == kept.nbytes == 4000
    del kept
    assert held.now == 0 and held.peak == 4000


@pytest.mark.usefixtures("tiny")
def test_the_command_shows_and_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench"
    options = ["--shape", "small_janus", "--prompts", "2", "--group_size", "2", "--repeats", "1", "--busy"]
    parts = ["--what", "rollout", "step", "log_probs", "scaling"]
    assert main(["bench", *options, *parts, "--device", "cpu", "--out", str(out)]) == 0
    written = json.loads((out / "bench.json").read_text())
    assert (written["images"], written["codes"]) == (4, 16)
    assert list(written["results"]["rollout"]) == ["ours", "library", "plain"]
    assert list(written["results"]["step"]) == ["ours", "ours (grpo)", "plain"]
    assert len(written["results"]["log_probs"]) == 4
    for ways in written["results"].values():
        assert all(seconds >= 0 for way in ways.values() for seconds in way["seconds"].values())
    assert written["results"]["step"]["plain"]["seconds"]["log-prob passes"] > 0
    assert [row["axis"] for row in written["rows"]] == ["group", "codes", "codes", "vocabulary", "vocabulary", "width"]
    assert written["predictions"]["small_janus"].keys() == {"1", "8", "64"}
    assert (out / "scaling.png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert "Rollout: 4 images of 16 codes, guidance 5" in shown and "× ours" in shown and "64 devices" in shown
    assert main(["bench", *options, "--out", str(out)]) == 2
    assert "overwrite" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny")
def test_a_step_with_adapters(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--shape", "small_janus", "--prompts", "2", "--group_size", "2", "--repeats", "1", "--lora_rank", "2"]
    assert main(["bench", "--what", "step", *options, "--device", "cpu"]) == 0
    assert "log-prob passes" in capsys.readouterr().out


def test_table_compares_each_way_with_ours_under_its_head() -> None:
    from gcpo_t2i.bench.show import _ours

    results = {name: Result({"both": 1.0}, 0) for name in ("ours, frozen head", "plain, frozen head")}
    assert _ours(results, "plain, frozen head") is results["ours, frozen head"]
    assert _ours(results, "ours, frozen head") is results["ours, frozen head"]
    results = {name: Result({"rollout": 1.0}, 0) for name in ("ours", "ours (grpo)", "library", "plain")}
    assert all(_ours(results, name) is results["ours"] for name in results)
    alone = {"plain": Result({"rollout": 1.0}, 0)}
    assert _ours(alone, "plain") is alone["plain"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--what", "scaling"],
            "shape 'shapesworld': scaling varies sizes, and its weights are given; use small_janus",
        ),
        (["--what", "[]"], "what: at least one of rollout, step, log_probs, scaling is needed"),
        (["--group_size", "1"], "group_size 1 leaves no group"),
        (["--busy", "--device", "cuda"], "busy counts seconds of processors, and device is cuda; drop one of them"),
        (["--shape", "small_janu"], "shape 'small_janu' is unknown; did you mean 'small_janus'?"),
    ],
)
def test_what_cannot_be_measured(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *options]) == 2
    assert message in capsys.readouterr().err
