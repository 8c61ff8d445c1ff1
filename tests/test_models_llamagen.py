"""The LlamaGen policy: sequence layout, captions, null captions, scoring, and its folder."""

from __future__ import annotations

import copy
import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import VQModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from gcpo_t2i.errors import UserError
from gcpo_t2i.models import decoding, load_policy, teacher_forcing
from gcpo_t2i.models.llamagen import LlamaGenPolicy
from gcpo_t2i.models.policy import Condition, Rollout

TEXTS = ["a photo of a red circle", "two", "a photo of two blue circle square a a a a"]  # 6, 1 and 10 words of L = 8
CODES = 64


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<unk>", "a", "photo", "of", "red", "blue", "circle", "square", "two"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


def tiny_vq(codes: int = CODES) -> VQModel:
    torch.manual_seed(0)
    return VQModel(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 8),
        latent_channels=4,
        vq_embed_dim=4,
        num_vq_embeddings=codes,
        norm_num_groups=4,
    )


@functools.cache
def tiny_policy(kv_heads: int = 4) -> LlamaGenPolicy:
    """Random weights, logits far from uniform. Shared between tests: copy before changing it."""
    torch.manual_seed(0)
    policy = LlamaGenPolicy.build(
        tokenizer=tiny_tokenizer(), vq_model=tiny_vq(), grid=(4, 4), caption_tokens=8, dim=32, layers=2, heads=4,
        kv_heads=kv_heads, text_dim=16, text_heads=2,
    )  # fmt: skip
    policy.adapter.head.weight.data *= 3
    return policy.eval()


def random_codes(rows: int, seed: int = 0) -> Tensor:
    return torch.randint(CODES, (rows, 16), generator=torch.Generator().manual_seed(seed))


def logits_of(policy: LlamaGenPolicy, condition: Condition, codes: Tensor) -> Tensor:
    return policy(condition.states, condition.mask, codes)


# ---- sequence layout


def test_forward_is_the_trunk_over_prefix_and_codes() -> None:
    """Logits of code t come from position L − 1 + t of [L caption positions][codes but the last], nothing trimmed."""
    policy, codes = tiny_policy(), random_codes(3)
    condition = policy.condition(TEXTS)
    embeds = torch.cat(
        [policy.adapter.caption_projector(condition.states), policy.trunk.embed_tokens(codes[:, :-1])], dim=1
    )
    valid = torch.cat([condition.mask, torch.ones(3, 15, dtype=torch.bool)], dim=1)
    output = policy.trunk(inputs_embeds=embeds, attention_mask=valid).last_hidden_state
    torch.testing.assert_close(
        logits_of(policy, condition, codes), policy.adapter.head(output[:, 7:]), atol=1e-5, rtol=1e-5
    )


def test_a_code_changes_only_later_logits() -> None:
    policy, codes = tiny_policy(), random_codes(3)
    condition = policy.condition(TEXTS)
    before = logits_of(policy, condition, codes)
    codes[:, 5] = (codes[:, 5] + 1) % CODES
    after = logits_of(policy, condition, codes)
    changed = (before - after).abs().amax(dim=(0, 2)) > 1e-5  # (T,)
    assert changed.tolist() == [False] * 6 + [True] * 10


def test_a_caption_scores_alike_alone_and_beside_longer_ones() -> None:
    policy, codes = tiny_policy(), random_codes(3)
    together = logits_of(policy, policy.condition(TEXTS), codes)
    for row, text in enumerate(TEXTS):
        alone = logits_of(policy, policy.condition([text]), codes[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)


def test_every_part_learns_and_padding_gives_no_nan() -> None:
    policy = tiny_policy()
    condition = policy.encode_text(TEXTS)
    assert not condition.mask.all()
    condition = policy.drop_captions(condition, torch.tensor([True, False, False]))
    policy.zero_grad()
    logits_of(policy, condition, random_codes(3)).logsumexp(-1).sum().backward()
    gradients = {name: p.grad for name, p in policy.named_parameters() if not name.startswith("vq.")}
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.isfinite().all()] == []
    used = policy.adapter.uncond_embedding.grad.abs().sum(1) > 0  # type: ignore[union-attr]
    assert used.tolist() == [False] * 2 + [True] * 6  # the dropped caption has 6 words
    policy.zero_grad()


# ---- captions


def test_captions_are_moved_to_the_right_end() -> None:
    policy = tiny_policy()
    condition = policy.condition(TEXTS)
    assert condition.mask.sum(1).tolist() == [6, 1, 8]  # the third is cut at L = 8
    ids = policy.tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        alone = policy.text_encoder(input_ids=ids).last_hidden_state[0]  # (6, D), no padding anywhere
    torch.testing.assert_close(condition.states[0, 2:], alone, atol=1e-5, rtol=1e-5)
    assert condition.mask[0].tolist() == [False] * 2 + [True] * 6
    assert (condition.states[0, :2] == 0).all()
    assert not condition.states.requires_grad and policy.encode_text(TEXTS).states.requires_grad


def test_unknown_words_and_empty_captions() -> None:
    policy = tiny_policy()
    zebra, giraffe, empty = policy.condition(["red zebra", "red giraffe", ""]).states
    assert torch.equal(zebra, giraffe) and empty.isfinite().all()
    condition = policy.condition([""])
    assert condition.mask.tolist() == [[False] * 7 + [True]]
    assert logits_of(policy, condition, random_codes(1)).isfinite().all()


def test_null_rows_take_the_mask_of_like() -> None:
    policy = tiny_policy()
    like = policy.condition(TEXTS)
    null = policy.condition([None, "red circle", None], like=like)
    assert torch.equal(null.mask[[0, 2]], like.mask[[0, 2]])
    assert null.mask[1].sum() == 2  # a negative prompt keeps its own mask
    torch.testing.assert_close(null.states[0, 2:], policy.adapter.uncond_embedding.data[2:])
    torch.testing.assert_close(null.states[1], policy.condition(["red circle"]).states[0])
    assert policy.condition([None]).mask.all() and not null.states.requires_grad
    with pytest.raises(ValueError, match="2 texts, but `like` has 3 rows"):
        policy.condition([None, None], like=like)


def test_condition_records_select_and_repeat() -> None:
    condition = tiny_policy().condition(TEXTS)
    assert len(condition) == 3 and len(condition[[0, 2]]) == 2
    repeated = condition.repeat_interleave(2)
    assert torch.equal(repeated.states[3], condition.states[1]) and torch.equal(repeated.mask[4], condition.mask[2])
    assert condition[:2].trimmed().mask.shape == (2, 6)


def test_trainable_parts_and_modes() -> None:
    policy = LlamaGenPolicy.build(
        tokenizer=tiny_tokenizer(), vq_model=tiny_vq(), grid=(4, 4), caption_tokens=8, dim=16, layers=1, heads=4,
        text_dim=8, text_layers=1, text_heads=2,
    )  # fmt: skip
    chosen = policy.set_trainable()
    names = {name.split(".")[0] for name, p in policy.named_parameters() if p.requires_grad}
    assert names == {"trunk", "adapter"} and not policy.adapter.uncond_embedding.requires_grad
    assert sum(p.numel() for p in chosen) == sum(p.numel() for p in policy.parameters() if p.requires_grad)
    policy.train()
    assert policy.trunk.training and not policy.text_encoder.training and not policy.vq.training


# ---- scoring


def test_logp_and_entropy_against_the_full_logits() -> None:
    policy, codes = tiny_policy(), random_codes(3)
    cond = policy.condition(TEXTS)
    null = policy.condition([None] * 3, like=cond)
    a, b = logits_of(policy, cond, codes).double(), logits_of(policy, null, codes).double()
    # (cond − null) * 2.5 + null, over the temperature 0.7
    for logits, settings in ((a, {}), (((a - b) * 2.5 + b), {"null": null, "guidance": 2.5}), (a, {"null": null})):
        table = (logits / 0.7).log_softmax(-1)
        scores = policy.logp(cond, codes, temperature=0.7, entropy=True, **settings)
        assert scores.logp.dtype == torch.float32 and scores.entropy is not None
        expected = table.gather(-1, codes[..., None]).squeeze(-1)
        torch.testing.assert_close(scores.logp.double(), expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(scores.entropy.double(), -(table.exp() * table).sum(-1), atol=1e-4, rtol=0)
    assert policy.logp(cond, codes).entropy is None


@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
def test_chunked_scores_have_the_same_values_and_gradients(monkeypatch: pytest.MonkeyPatch, frozen: bool) -> None:
    policy, codes = copy.deepcopy(tiny_policy()), random_codes(2)
    policy.adapter.head.requires_grad_(not frozen)
    cond = policy.condition(TEXTS[:2])
    null = policy.condition([None] * 2, like=cond)
    weight = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    results = []
    for budget in (teacher_forcing.SCORE_BUDGET, 2 * CODES * 3):  # one chunk; chunks of 3 tokens, and a last one of 1
        monkeypatch.setattr(teacher_forcing, "SCORE_BUDGET", budget)
        policy.zero_grad()
        scores = policy.logp(cond, codes, null=null, guidance=3.0, entropy=True)
        assert scores.entropy is not None
        ((scores.logp + 0.5 * scores.entropy) * weight).sum().backward()
        gradients = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
        results.append([scores.logp, scores.entropy, *gradients])
    policy.zero_grad()
    assert len(results[0]) == len(results[1])
    for whole, chunked in zip(*results, strict=True):
        # sums in another order: rounding is of the size of the largest gradient
        torch.testing.assert_close(whole, chunked, atol=1e-5 * max(1.0, whole.abs().max().item()), rtol=1e-4)


def test_rescoring_says_what_the_sampler_knew(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy()
    cond = policy.condition(TEXTS)
    null = policy.condition([None, "two", None], like=cond)
    how = {"guidance": 2.0, "temperature": 0.7, "stats": ("exact_kl", "js", "entropy")}
    rollout = policy.sample(cond, null, group=2, generator=torch.Generator().manual_seed(0), **how)
    for budget in (teacher_forcing.SCORE_BUDGET, 12 * CODES * 3):  # one chunk; chunks of 3 tokens, and a last one of 1
        monkeypatch.setattr(teacher_forcing, "SCORE_BUDGET", budget)
        again = policy.rescore(cond.repeat_interleave(2), null.repeat_interleave(2), rollout.tokens, **how)
        assert torch.equal(again.tokens, rollout.tokens) and again.stats.keys() == rollout.stats.keys()
        for name in ("cond_logp", "null_logp", "sample_logp"):
            torch.testing.assert_close(getattr(again, name), getattr(rollout, name), atol=1e-4, rtol=0)
        for name, values in rollout.stats.items():
            torch.testing.assert_close(again.stats[name], values, atol=1e-4, rtol=0)
    alone = policy.rescore(cond.repeat_interleave(2), None, rollout.tokens, temperature=0.7)
    torch.testing.assert_close(alone.cond_logp, rollout.cond_logp, atol=1e-4, rtol=0)
    assert alone.null_logp is None and torch.equal(alone.sample_logp, alone.cond_logp)


@pytest.mark.parametrize("known", [1, 7, 15])
def test_images_can_begin_with_given_codes(known: int) -> None:
    """The random numbers decide the codes: those of the last T − n positions, given the first n, repeat an image."""
    policy = tiny_policy()
    cond = policy.condition(TEXTS[:2])
    null = policy.condition([None] * 2, like=cond)

    def sample(numbers: Tensor, **settings: object) -> Rollout:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decoding, "uniform_numbers", lambda *_: numbers)
            return policy.sample(cond, null, guidance=2.0, **settings)  # pyright: ignore[reportArgumentType]

    numbers = torch.rand(2, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    whole = sample(numbers, group=1)
    rest = sample(numbers[:, known:], group=1, given=whole.tokens[:, :known])
    assert torch.equal(rest.tokens, whole.tokens[:, known:])
    torch.testing.assert_close(rest.null_logp, whole.null_logp[:, known:], atol=1e-4, rtol=0)
    many = sample(numbers[[0, 0, 1, 1], known:], group=2, given=whole.tokens[:, :known])
    assert torch.equal(many.tokens, whole.tokens[[0, 0, 1, 1], known:])


def test_the_null_branch_gets_no_gradient() -> None:
    """Gradients are those of the mixture written out with a detached null branch, also at the head both share."""
    policy, codes = tiny_policy(), random_codes(1)
    cond = policy.condition(TEXTS[:1])
    null = policy.condition([None], like=cond)
    gradients = []
    a, b = logits_of(policy, cond, codes), logits_of(policy, null, codes).detach()
    by_hand = (b + 2.0 * (a - b)).log_softmax(-1).gather(-1, codes[..., None]).sum()
    for total in (by_hand, policy.logp(cond, codes, null=null, guidance=2.0).logp.sum()):
        policy.zero_grad()
        total.backward()
        gradients.append([p.grad.clone() for p in policy.parameters() if p.grad is not None])
    policy.zero_grad()
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_logp_is_float32_under_bf16_autocast() -> None:
    policy, codes = tiny_policy(), random_codes(3)
    cond = policy.condition(TEXTS)
    exact = policy.logp(cond, codes).logp
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = logits_of(policy, cond, codes)
        rough = policy.logp(cond, codes).logp
    assert rough.dtype == logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())  # the head itself ran in float32
    assert (exact - rough).abs().mean() < 0.05 and not torch.equal(exact, rough)


def test_attention_back_ends_agree() -> None:
    """Padding is masked by what transformers makes of the 2-D mask for each back end."""
    policy, codes = copy.deepcopy(tiny_policy()), random_codes(3)
    cond = policy.condition(TEXTS)
    sdpa = logits_of(policy, cond, codes)
    policy.trunk.set_attn_implementation("eager")
    torch.testing.assert_close(logits_of(policy, cond, codes), sdpa, atol=1e-5, rtol=1e-5)


# ---- folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy") / "tiny"
    tiny_policy().save_pretrained(folder)
    return folder


@pytest.fixture
def broken(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "broken"))


def test_round_trip_gives_equal_logits(saved: Path) -> None:
    policy, codes = load_policy(saved), random_codes(3)
    assert isinstance(policy, LlamaGenPolicy) and not policy.training and policy.grid == (4, 4)
    condition = policy.condition(TEXTS)
    assert torch.equal(logits_of(policy, condition, codes), logits_of(tiny_policy(), condition, codes))
    assert torch.equal(condition.states, tiny_policy().condition(TEXTS).states)
    assert policy.decode(codes)[0].tobytes() == tiny_policy().decode(codes)[0].tobytes()
    assert not [name for name in policy.trunk.state_dict() if "rotary" in name]


def test_folder_is_laid_out_like_a_pipeline(saved: Path) -> None:
    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == "LlamaGenPolicy" and index["format_version"] == 1
    assert index["trunk"] == ["transformers", "LlamaModel"]
    assert {path.name for path in saved.iterdir()} == {
        "model_index.json", "trunk", "adapter", "text_encoder", "tokenizer", "vq",
    }  # fmt: skip
    assert VQModel.from_pretrained(saved / "vq").config["num_vq_embeddings"] == CODES


def test_what_is_saved_does_not_tell_where_it_was_loaded_from(saved: Path, tmp_path: Path) -> None:
    load_policy(saved).save_pretrained(tmp_path / "again")
    files = [path for path in (tmp_path / "again").rglob("*") if path.is_file()]
    assert len(files) > 8 and not [path for path in files if str(saved).encode() in path.read_bytes()]


def test_dtype_is_of_all_but_the_tokenizer(saved: Path) -> None:
    policy = load_policy(saved, dtype=torch.bfloat16)
    assert isinstance(policy, LlamaGenPolicy)
    dtypes = {name.split(".")[0]: p.dtype for name, p in policy.named_parameters()}
    assert dtypes.pop("vq") == torch.float32 and set(dtypes.values()) == {torch.bfloat16}
    cond = policy.condition(TEXTS)
    assert policy.logp(cond, random_codes(3)).logp.dtype == torch.float32
    rollout = policy.sample(cond, policy.condition([None] * 3, like=cond), group=2, guidance=2.0)
    assert rollout.sample_logp.dtype == torch.float32 and len(policy.decode(rollout.tokens)) == 6


def _edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_missing_folder_and_files(broken: Path) -> None:
    with pytest.raises(UserError, match=r"no model folder at .*nowhere"):
        load_policy(broken / "nowhere")
    for part, file in (("adapter", "config.json"), ("trunk", "model.safetensors"), ("vq", "config.json")):
        (broken / part / file).rename(broken / "away")
        with pytest.raises(UserError, match=part):
            load_policy(broken)
        (broken / "away").rename(broken / part / file)
    shutil.rmtree(broken / "tokenizer")
    with pytest.raises(UserError, match="tokenizer is missing"):
        load_policy(broken)
    (broken / "model_index.json").unlink()
    with pytest.raises(UserError, match=r"model_index\.json is missing"):
        load_policy(broken)


def test_unknown_class_newer_version_and_bad_json(broken: Path) -> None:
    index = broken / "model_index.json"
    _edit_json(index, _class_name="LlamagenPolicy")
    with pytest.raises(UserError, match="unknown policy class 'LlamagenPolicy'; did you mean 'LlamaGenPolicy'"):
        load_policy(broken)
    _edit_json(index, _class_name="LlamaGenPolicy", format_version=2)
    with pytest.raises(UserError, match=r"format version 2.*reads up to 1"):
        load_policy(broken)
    for text, problem in (("{", "not valid JSON"), ("[]", "expected a JSON object")):
        index.write_text(text)
        with pytest.raises(UserError, match=problem):
            load_policy(broken)


def test_absent_and_misshapen_weights(broken: Path) -> None:
    """transformers alone would only warn, and leave random weights in place of the absent ones."""
    path = broken / "trunk" / "model.safetensors"
    weights = load_file(path)
    save_file({k: v for k, v in weights.items() if k != "norm.weight"}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"trunk.*missing_keys.*norm\.weight"):
        load_policy(broken)
    save_file({**weights, "norm.weight": torch.ones(7)}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="trunk"):
        load_policy(broken)
    path.write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="trunk"):
        load_policy(broken)


def test_parts_that_do_not_fit_each_other(broken: Path) -> None:
    tiny_vq(codes=32).save_pretrained(broken / "vq")
    with pytest.raises(UserError, match=r"disagree on codes.*'VQ codebook': 32"):
        load_policy(broken)
    _edit_json(broken / "adapter" / "config.json", codes=32)
    with pytest.raises(UserError, match="adapter"):
        load_policy(broken)


def test_importing_the_package_is_cheap() -> None:
    import subprocess
    import sys

    code = (
        "import sys, gcpo_t2i.models; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'diffusers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
