"""The decoding engine: cached ≡ uncached, drawing by hand, groups, seeds, and what it refuses."""

from __future__ import annotations

import copy
import warnings
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from gcpo_t2i.algo import credit
from gcpo_t2i.models import cache, decoding, drawing, graphs
from gcpo_t2i.models.layers import Layer
from gcpo_t2i.models.llamagen import LlamaGenPolicy
from gcpo_t2i.models.policy import Condition, Rollout
from tests.test_models_llamagen import CODES, TEXTS, logits_of, random_codes, tiny_policy

NEGATIVES = [None, "blue blue", None]
ALL_STATS = ("exact_kl", "js", "entropy", "null_hidden")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def both(policy: LlamaGenPolicy, texts: list[str] = TEXTS) -> tuple[Condition, Condition]:
    cond = policy.condition(texts)
    return cond, policy.condition(list(NEGATIVES[: len(texts)]), like=cond)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def check_against_full_forward(
    policy: LlamaGenPolicy, rollout: Rollout, cond: Condition, null: Condition, guidance: float, temperature: float
) -> None:
    a, b = (logits_of(policy, rows, rollout.tokens).detach() / temperature for rows in (cond, null))
    mixture = b + guidance * (a - b)
    for logits, logp in ((a, rollout.cond_logp), (b, rollout.null_logp), (mixture, rollout.sample_logp)):
        assert logp is not None and logp.dtype == torch.float32
        close(logp, logits.log_softmax(-1).gather(-1, rollout.tokens[..., None]).squeeze(-1))
    p, q, m = a.softmax(-1), b.softmax(-1), mixture.softmax(-1)
    half = (p + q) / 2
    close(rollout.stats["exact_kl"], (p * (p.log() - q.log())).sum(-1))
    close(rollout.stats["js"], ((p * (p / half).log()).sum(-1) + (q * (q / half).log()).sum(-1)) / 2)
    close(rollout.stats["entropy"], -(m * m.log()).sum(-1))
    close(policy.logp(cond, rollout.tokens, temperature=temperature).logp, rollout.cond_logp)
    guided = policy.logp(cond, rollout.tokens, temperature=temperature, null=null, guidance=guidance, entropy=True)
    close(guided.logp, rollout.sample_logp)
    assert guided.entropy is not None
    close(guided.entropy, rollout.stats["entropy"])
    kept = policy.logp(
        cond, rollout.tokens, temperature=temperature, null=rollout.stats["null_hidden"], guidance=guidance
    )
    close(kept.logp, guided.logp)


@pytest.mark.parametrize("block", [4, 32])  # the cache grows; the cache fits at once
@pytest.mark.parametrize(("guidance", "temperature", "kv_heads"), [(1.0, 1.0, 4), (2.5, 1.0, 4), (3.0, 0.7, 2)])
def test_cached_equals_uncached(
    monkeypatch: pytest.MonkeyPatch, block: int, guidance: float, temperature: float, kv_heads: int
) -> None:
    """Captions of 6, 1 and 8 tokens, a negative prompt of its own length, groups of 2, both branches and the mixture."""
    monkeypatch.setattr(cache, "BLOCK", block)
    policy = tiny_policy(kv_heads)
    cond, null = both(policy)
    rollout = policy.sample(
        cond, null, group=2, guidance=guidance, temperature=temperature, generator=seeded(), stats=ALL_STATS
    )
    assert rollout.tokens.shape == (6, 16) and rollout.tokens.dtype == torch.int64
    check_against_full_forward(
        policy, rollout, cond.repeat_interleave(2), null.repeat_interleave(2), guidance, temperature
    )


def test_sampling_asks_the_library_for_nothing_that_it_warns_of() -> None:
    policy = tiny_policy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy.sample(*both(policy), group=1, guidance=2.0, generator=seeded())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_equals_uncached_on_cuda(dtype: torch.dtype) -> None:
    policy = copy.deepcopy(tiny_policy()).to("cuda", dtype)
    cond, null = both(policy)
    rollout = policy.sample(cond, null, group=2, guidance=2.5, generator=seeded(), stats=ALL_STATS)
    replay = policy.logp(cond.repeat_interleave(2), rollout.tokens, null=null.repeat_interleave(2), guidance=2.5)
    gap = (replay.logp - rollout.sample_logp).abs()
    assert gap.max() < 1e-3 if dtype == torch.float32 else gap.mean() < 0.1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("lower", [False, True])
def test_captured_steps_equal_called_ones_on_cuda(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lower: bool
) -> None:
    monkeypatch.setattr(cache, "BLOCK", 8)  # memory-efficient attention wants masks of such a length
    policy = copy.deepcopy(tiny_policy()).to("cuda")
    cond, null = both(policy)

    def sample() -> Rollout:
        with torch.autocast("cuda", torch.bfloat16, enabled=lower):
            return policy.sample(cond, null, group=2, guidance=2.5, top_p=0.95, generator=seeded(), stats=ALL_STATS)

    captured, again = sample(), sample()
    assert not caplog.messages  # no fallback
    assert torch.equal(captured.tokens, again.tokens)
    monkeypatch.setattr(graphs.Steps, "__call__", graphs.Steps.warm_up)
    called = sample()
    assert torch.equal(captured.tokens, called.tokens)
    close(captured.sample_logp, called.sample_logp)


def test_sampling_under_bf16_autocast() -> None:
    policy = tiny_policy()
    cond, null = both(policy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rollout = policy.sample(cond, null, group=2, guidance=2.0, generator=seeded(), stats=ALL_STATS)
        replay = policy.logp(cond.repeat_interleave(2), rollout.tokens).logp
    assert rollout.cond_logp.dtype == torch.float32
    assert (replay - rollout.cond_logp).abs().mean() < 0.05


class LowRank(nn.Module):
    """What PEFT puts in a projection's place."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(2, base.in_features, generator=seeded(1)))
        self.up = nn.Parameter(torch.randn(base.out_features, 2, generator=seeded(2)) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


def test_replaced_projections_are_used_when_sampling() -> None:
    policy = copy.deepcopy(tiny_policy())
    cond, null = both(policy)
    plain = policy.sample(cond, null, group=1, guidance=2.0, generator=seeded())
    for layer in policy.trunk.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, LowRank(getattr(layer.self_attn, name)))
        layer.mlp.down_proj = LowRank(layer.mlp.down_proj)
    rollout = policy.sample(cond, null, group=1, guidance=2.0, generator=seeded(), stats=ALL_STATS)
    assert not torch.equal(rollout.tokens, plain.tokens)
    check_against_full_forward(policy, rollout, cond, null, 2.0, 1.0)


def test_a_cache_that_grows_keeps_what_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "BLOCK", 2)
    keys, values = (torch.randn(1, 2, 3, 4, generator=seeded(seed)) for seed in (1, 2))
    grown = cache.Cache(
        cache.Prefix([keys, keys + 1], [values, values + 1], torch.ones(1, 3, dtype=torch.bool)), 2, 5, True
    )
    assert grown.capacity == 4 and grown.spare.numel() == 2 * 2 * 4 * 8  # 2 rows, 2 heads, 4 channels, 8 positions
    memory = {tensor.data_ptr() for tensor in (*grown.keys, *grown.values, grown.spare)}
    for positions, span in ((4, 4), (5, 6), (8, 8)):
        assert grown.span(positions) == span
        for layer in (0, 1):
            for tensor, expected in ((grown.keys[layer], keys + layer), (grown.values[layer], values + layer)):
                assert tensor.shape == (2, 2, span, 4) and tensor.is_contiguous()
                assert torch.equal(tensor[:, :, :3], expected.expand(2, -1, -1, -1)) and not tensor[:, :, 3:].any()
            read_keys, read_values = grown.read(span)[layer]  # of the memory that was written to last
            assert torch.equal(read_keys, grown.keys[layer].view(4, span, 4).mT)
            assert torch.equal(read_values, grown.values[layer].view(4, span, 4))
    assert {tensor.data_ptr() for tensor in (*grown.keys, *grown.values, grown.spare)} == memory  # nothing is allocated


def decoder_of(policy: LlamaGenPolicy) -> decoding.Decoder:
    """Past its first code, for 3 × 2 samples of 16 codes."""
    cond, null = both(policy)
    rows = Condition.cat([cond, null]).trimmed()
    hidden, prefix = cache.prefill(policy.trunk, policy.prefix(rows), rows.mask, 0)
    how = drawing.Sampling(2.0, stats=ALL_STATS)
    decoder = decoding.Decoder(
        *(policy.trunk, policy.embed_codes, policy.head, prefix),
        start=0, length=16, group=2, guided=True, how=how, generator=seeded(),
    )  # fmt: skip
    decoder.record(hidden.repeat_interleave(2, 0))
    return decoder


@torch.no_grad()
def test_a_step_changes_its_buffers_in_place_and_reads_its_position_from_one() -> None:
    """What a captured graph needs: the same function, called again with nothing new from outside."""
    decoder = decoder_of(tiny_policy())

    def buffers() -> list[Tensor]:
        own = [decoder.index, decoder.tokens, decoder.uniform, *decoder.rotary, *decoder.columns.values()]
        return [*own, *decoder.cache.keys, *decoder.cache.values, decoder.cache.bias]

    span, where = decoder.span(15), [tensor.data_ptr() for tensor in buffers()]
    for drawn in range(2, 17):
        decoder.step(span)
        assert decoder.index.item() == drawn
        assert torch.equal(decoder.tokens, decoder.columns["tokens"][:, drawn - 1])
    assert [tensor.data_ptr() for tensor in buffers()] == where


def test_the_static_cache_of_accelerators_gives_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "BLOCK", 4)
    policy = tiny_policy()
    sample = lambda: policy.sample(*both(policy), group=2, guidance=2.5, generator=seeded(), stats=ALL_STATS)  # noqa: E731
    grown, spans = sample(), []
    step = decoding.decode_step

    def watched(layers: object, x: Tensor, slot: Tensor, rotary: object, static: cache.Cache, span: int) -> Tensor:
        spans.append((span, static.capacity))
        return step(layers, x, slot, rotary, static, span)  # type: ignore[arg-type]

    monkeypatch.setattr(decoding, "decode_step", watched)
    monkeypatch.setattr(decoding, "Cache", lambda *sizes, grows: cache.Cache(*sizes, grows=False))
    static = sample()
    assert [span for span, _ in spans] == [12] * 4 + [16] * 4 + [20] * 4 + [24] * 3  # 8 + 1 … 8 + 15 positions in use
    assert {capacity for _, capacity in spans} == {24}
    assert torch.equal(static.tokens, grown.tokens)
    close(static.sample_logp, grown.sample_logp)


class RecordedGraph:
    """In a CUDA graph's place: its replay is the step that was captured."""

    made: ClassVar[list[int]] = []

    def __init__(self, decoder: decoding.Decoder, span: int) -> None:
        self.made.append(span)
        self.replay = lambda: decoder.step(span)


@torch.no_grad()
@pytest.mark.parametrize("fails", [False, True])
def test_one_graph_for_every_span_and_plain_steps_where_capturing_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails: bool
) -> None:
    monkeypatch.setattr(cache, "BLOCK", 4)
    monkeypatch.setattr(RecordedGraph, "made", [])
    plain, decoder = decoder_of(tiny_policy()), decoder_of(tiny_policy())
    graphs.advance(plain, 16)

    def captured(steps: graphs.Steps, span: int) -> RecordedGraph:
        if fails:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        return RecordedGraph(steps.decoder, span)

    monkeypatch.setattr(graphs.Steps, "_captured", captured)
    steps = graphs.Steps(decoder)
    steps.warm_up(decoder.span(1))
    steps.device = torch.device("cuda")
    for drawn in range(2, 16):
        steps(decoder.span(drawn))
    assert torch.equal(decoder.columns["tokens"], plain.columns["tokens"])
    assert RecordedGraph.made == ([] if fails else [12, 16, 20, 24])
    said = ["decoding without CUDA graphs: operation not permitted when stream is capturing"] if fails else []
    assert caplog.messages == said


def test_both_attentions_agree() -> None:
    query, keys, values = (torch.randn(3, n, 12, 8, generator=seeded(n)) for n in (4, 2, 3))
    query, values = query[:, :, 0], values[:, :2]  # 4 heads over 2 kv heads
    bias = torch.zeros(3, 1, 1, 12)
    bias[0, ..., :4] = -torch.inf
    bias[:, ..., 10:] = -torch.inf
    fused = cache.attend_fused(query, keys, values, bias, 0.3)
    each = bias.expand(3, 2, 1, 12).flatten(0, 1)  # of the 2 kv heads
    flat = keys.flatten(0, 1).transpose(1, 2), values.flatten(0, 1)
    torch.testing.assert_close(cache.attend_by_products(query, *flat, each, 0.3), fused, atol=1e-5, rtol=1e-5)


# ---- groups, prefill, seeds


def test_prefixes_run_once_and_both_branches_decode_in_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy()
    cond, null = both(policy)
    prefilled, decoded = [], []
    run, step = policy.trunk.forward, decoding.decode_step

    def count_prefill(*args: object, **kwargs: Tensor) -> object:
        prefilled.append(kwargs["inputs_embeds"].shape[0])
        return run(*args, **kwargs)

    def count_step(layers: list[Layer], x: Tensor, *rest: object) -> Tensor:
        decoded.append(x.shape[0])
        return step(layers, x, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(policy.trunk, "forward", count_prefill)
    monkeypatch.setattr(decoding, "decode_step", count_step)
    policy.sample(cond, null, group=4, guidance=2.0, generator=seeded(), stats=ALL_STATS)
    assert prefilled == [6]  # 3 prompts and their null rows, once
    assert decoded == [24] * 15  # 2 branches x 12 samples; the first code comes from the prefill


def greedy_by_full_forward(policy: LlamaGenPolicy, cond: Condition, null: Condition, guidance: float) -> Tensor:
    codes = torch.zeros(len(cond), 16, dtype=torch.int64)
    for t in range(16):
        a, b = logits_of(policy, cond, codes), logits_of(policy, null, codes)
        codes[:, t] = (b + guidance * (a - b))[:, t].argmax(-1)
    return codes


def test_top_k_1_is_greedy_and_groups_are_contiguous() -> None:
    policy = tiny_policy()
    cond, null = both(policy)
    rollout = policy.sample(cond, null, group=3, guidance=2.0, top_k=1, generator=seeded())
    expected = greedy_by_full_forward(policy, cond, null, 2.0)
    assert len({tuple(row) for row in expected.tolist()}) == 3
    assert torch.equal(rollout.tokens, expected.repeat_interleave(3, 0))
    assert (rollout.sample_logp < 0).all()  # of the whole mixture, not of what top_k left


def test_same_seed_same_codes() -> None:
    policy = tiny_policy()
    cond, null = both(policy)
    first, again, other = (policy.sample(cond, null, group=2, guidance=2.0, generator=seeded(s)) for s in (5, 5, 6))
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.sample_logp, again.sample_logp)
    assert not torch.equal(first.tokens, other.tokens)
    assert not torch.equal(first.tokens[0], first.tokens[1])  # members of a group differ


def test_a_prompt_samples_alike_alone_and_before_longer_ones() -> None:
    policy = tiny_policy()
    together = policy.sample(*both(policy), group=2, guidance=2.0, generator=seeded())
    alone = policy.sample(*both(policy, TEXTS[:1]), group=2, guidance=2.0, generator=seeded())
    assert torch.equal(together.tokens[:2], alone.tokens)
    close(together.sample_logp[:2], alone.sample_logp)


def test_with_a_generator_for_each_sample_its_numbers_do_not_depend_on_its_batch() -> None:
    policy = tiny_policy()
    cond, null = both(policy)
    together = policy.sample(cond, null, group=2, guidance=2.0, generator=[seeded(s) for s in range(6)])
    for generator in ([seeded(5)], seeded(5)):
        alone = policy.sample(cond[[2]], null[[2]], group=1, guidance=2.0, generator=generator)
        assert torch.equal(together.tokens[5:], alone.tokens)
    with pytest.raises(ValueError, match="1 generators for 6 samples"):
        policy.sample(cond, null, group=2, guidance=2.0, generator=[seeded()])


def test_without_null_branch() -> None:
    policy = tiny_policy()
    cond, null = both(policy)
    rollout = policy.sample(cond, None, group=2, guidance=1.0, generator=seeded(), stats=("entropy",))
    with_null = policy.sample(cond, null, group=2, guidance=1.0, generator=seeded())
    assert rollout.null_logp is None and with_null.null_logp is not None
    assert torch.equal(rollout.tokens, with_null.tokens)
    assert torch.equal(rollout.cond_logp, rollout.sample_logp) and list(rollout.stats) == ["entropy"]


def test_rollouts_can_enter_a_loss_and_carry_no_gradient() -> None:
    policy = tiny_policy()
    cond, null = both(policy)
    rollout = policy.sample(cond, null, group=1, guidance=2.0, generator=seeded(), stats=ALL_STATS)
    tensors = [rollout.cond_logp, rollout.null_logp, rollout.sample_logp, *rollout.stats.values()]
    assert not any(tensor is None or tensor.requires_grad or tensor.is_inference() for tensor in tensors)
    (policy.logp(cond, rollout.tokens).logp - rollout.cond_logp).exp().mean().backward()
    policy.zero_grad()


# ---- drawing


def test_draw_by_hand() -> None:
    # cumulative probabilities 0.5, 0.5, 0.8, 1.0: code 1 has probability 0 and is never drawn
    logits = torch.tensor([0.5, 0.0, 0.3, 0.2]).log().expand(6, 4)
    uniform = torch.tensor([0.0, 0.4999, 0.5001, 0.7999, 0.8001, 1 - 2.0**-53], dtype=torch.float64)
    assert drawing.draw(logits, uniform).tolist() == [0, 0, 2, 2, 3, 3]


def test_draw_has_the_distribution_of_its_logits() -> None:
    logits = torch.randn(1, 10, generator=seeded())
    uniform = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000  # an even comb: counts are exact to one
    counts = torch.bincount(drawing.draw(logits.expand(10_000, 10), uniform), minlength=10)
    assert (counts - 10_000 * logits[0].softmax(-1)).abs().max() <= 1.01


def test_an_avoided_code_leaves_the_others_their_proportions() -> None:
    # probabilities 0.5, 0.3, 0.2: without code 0 they are 0.6 and 0.4, without code 1 they are 5/7 and 2/7
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(4, 3)
    uniform = torch.tensor([0.599, 0.601, 0.714, 0.715], dtype=torch.float64)
    found = drawing.pick(logits, uniform, False, drawing.Sampling(), torch.tensor([0, 0, 1, 1]))
    assert found["tokens"].tolist() == [1, 2, 0, 2]
    assert found["sample_logp"].exp().tolist() == pytest.approx([0.3, 0.2, 0.5, 0.2])  # those of all codes


def test_only_the_first_code_is_avoided() -> None:
    policy = tiny_policy()
    cond, null = both(policy, TEXTS[:2])
    whole = policy.sample(cond, null, group=1, guidance=2.0, generator=seeded())
    avoid = whole.tokens[:, 5]
    rest = policy.sample(
        cond, null, group=500, guidance=2.0, generator=seeded(), given=whole.tokens[:, :5], avoid=avoid
    ).tokens.view(2, 500, 11)
    assert not (rest[:, :, 0] == avoid[:, None]).any()
    assert all((rest[row, :, 1:] == avoid[row]).any() for row in (0, 1))


def kept(logits: Tensor, **settings: float) -> list[int]:
    return drawing.filter_logits(logits[None], **settings).isfinite()[0].nonzero().flatten().tolist()  # type: ignore[arg-type]


def test_top_k_and_top_p_by_hand() -> None:
    # Probabilities 0.15, 0.5, 0.05, 0.3. Falling: 1 (0.5), 3 (0.8 in all), 0 (0.95), 2 (1.0).
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    assert kept(logits) == [0, 1, 2, 3]
    assert kept(logits, top_k=1) == [1] and kept(logits, top_k=3) == [0, 1, 3] and kept(logits, top_k=9) == [0, 1, 2, 3]
    assert kept(logits, top_p=0.01) == [1] and kept(logits, top_p=0.49) == [1]
    assert kept(logits, top_p=0.51) == [1, 3] and kept(logits, top_p=0.79) == [1, 3]
    assert kept(logits, top_p=0.81) == [0, 1, 3] and kept(logits, top_p=0.96) == [0, 1, 2, 3]
    # top_k=2 leaves 0.5 and 0.3, that is 0.625 and 0.375: top_p then counts those
    assert kept(logits, top_k=2, top_p=0.6) == [1] and kept(logits, top_k=2, top_p=0.63) == [1, 3]


def test_log_probs_are_taken_before_the_filters() -> None:
    policy = tiny_policy()
    cond, null = both(policy)
    rollout = policy.sample(cond, null, group=2, guidance=2.0, top_k=5, top_p=0.9, generator=seeded(), stats=ALL_STATS)
    check_against_full_forward(policy, rollout, cond.repeat_interleave(2), null.repeat_interleave(2), 2.0, 1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0; greedy decoding is top_k=1"),
        ({"top_k": -1}, "top_k >= 0"),
        ({"top_p": 0.0}, "0 < top_p <= 1"),
        ({"stats": ("kl",)}, r"unknown stats \['kl'\]; known: exact_kl, js, entropy"),
    ],
)
def test_settings_without_meaning(settings: dict, message: str) -> None:
    policy = tiny_policy()
    with pytest.raises(ValueError, match=message):
        policy.sample(*both(policy), group=1, **{"guidance": 2.0, **settings})


def test_guidance_and_contrasts_need_a_null_condition() -> None:
    policy = tiny_policy()
    cond = policy.condition(TEXTS)
    for settings in ({"guidance": 2.0}, {"guidance": 1.0, "stats": ("exact_kl",)}):
        with pytest.raises(ValueError, match="need a null condition"):
            policy.sample(cond, None, group=1, **settings)


def test_random_codes_give_positive_contrasts() -> None:
    """The tiny policy's branches differ, or every parity test above would be empty."""
    policy = tiny_policy()
    cond, null = both(policy)
    a, b = (logits_of(policy, rows, random_codes(3)) for rows in (cond, null))
    assert credit.exact_kl(a, b).mean() > 1e-2 and a.shape[-1] == CODES
