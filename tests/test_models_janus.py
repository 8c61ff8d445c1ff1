"""The Janus policy against the library that defines it: prompts, null prompts, codes, pixels, folder."""

from __future__ import annotations

import copy
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    JanusConfig,
    JanusForConditionalGeneration,
    JanusProcessor,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
)

from gcpo_t2i.errors import UserError
from gcpo_t2i.models import hub, load_policy
from gcpo_t2i.models.janus import JanusPolicy
from gcpo_t2i.models.policy import Condition
from gcpo_t2i.models.sizes import read_sizes
from gcpo_t2i.parsing import load_config
from tests.tiny_janus import BOI, BOS, PAD, tiny_model, tiny_processor, write_tiny_janus

TEXTS = ["a photo of a red circle", "two", "a red square and two blue circle of a photo"]  # 6, 1 and 10 words
STATS = ("exact_kl", "js", "entropy")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Janus whose tokenizer pads with another token than its null prompt has. Read only."""
    return write_tiny_janus(tmp_path_factory.mktemp("janus"), pad_token="<eos>")


@pytest.fixture
def broken(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "broken"))


@functools.cache
def tiny_policy() -> JanusPolicy:
    """Shared between tests: copy before changing it."""
    with tempfile.TemporaryDirectory() as folder:
        policy = load_policy(write_tiny_janus(Path(folder)))
    assert isinstance(policy, JanusPolicy)
    return policy


def both(policy: JanusPolicy, texts: list[str] = TEXTS) -> tuple[Condition, Condition]:
    cond = policy.condition(texts)
    return cond, policy.condition([None] * len(texts), like=cond)


def library_inputs(folder: Path) -> dict[str, Tensor]:
    processor: Any = JanusProcessor.from_pretrained(folder)
    chats = [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in TEXTS]
    prompts = processor.apply_chat_template(chats, add_generation_prompt=True)
    return processor(text=prompts, generation_mode="image", padding=True, return_tensors="pt")


# ---- against the library


@pytest.mark.parametrize("guidance", [2.0, 5.0])
def test_greedy_codes_are_those_of_the_library(saved: Path, guidance: float) -> None:
    library: Any = JanusForConditionalGeneration.from_pretrained(saved)
    expected = library.generate(
        **library_inputs(saved), generation_mode="image", do_sample=False, guidance_scale=guidance
    )
    policy: Any = load_policy(saved)
    rollout = policy.sample(*both(policy), group=1, guidance=guidance, top_k=1)
    assert torch.equal(rollout.tokens, expected)
    assert len({tuple(row) for row in expected.tolist()}) == 3 and len(expected.unique()) > 10


def test_prompts_are_those_of_the_library(saved: Path) -> None:
    inputs, policy = library_inputs(saved), load_policy(saved)
    condition = policy.condition(TEXTS)
    assert torch.equal(condition.states, inputs["input_ids"])
    assert torch.equal(condition.mask, inputs["attention_mask"].bool())
    assert condition.mask.sum(1).tolist() == [10, 5, 14]  # <bos> User: … Assistant: <boi>


def test_images_are_those_of_the_library(saved: Path) -> None:
    library: Any = JanusForConditionalGeneration.from_pretrained(saved)
    processor: Any = JanusProcessor.from_pretrained(saved)
    codes = torch.randint(64, (18, 16), generator=torch.Generator().manual_seed(0))  # more than one chunk
    with torch.no_grad():
        pixels = library.decode_image_tokens(codes)
    expected = processor.postprocess(list(pixels.float()), return_tensors="pt")["pixel_values"]
    images = load_policy(saved).decode(codes)
    assert [image.size for image in images] == [(32, 32)] * 18
    arrays = np.stack([np.asarray(image) for image in images])
    assert arrays.std(axis=0).mean() > 5  # they are not all the same image
    assert (arrays == expected.permute(0, 2, 3, 1).numpy()).all()


def test_a_saved_policy_is_loaded_by_the_library(tmp_path: Path) -> None:
    policy = copy.deepcopy(tiny_policy())
    with torch.no_grad():
        policy.trunk.layers[0].mlp.down_proj.weight += 0.1
    policy.save_pretrained(tmp_path)
    library, info = JanusForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    own = policy.model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in library.state_dict().items())
    assert torch.equal(library_inputs(tmp_path)["input_ids"], policy.condition(TEXTS).states)
    assert library.generation_config.pad_token_id == PAD


# ---- captions


def test_the_null_prompt_is_pad_between_bos_and_boi() -> None:
    cond, null = both(tiny_policy(), TEXTS[:2])
    assert torch.equal(null.mask, cond.mask)
    assert null.states[0].tolist() == [BOS, *[PAD] * 8, BOI]
    assert null.states[1, 5:].tolist() == [BOS, *[PAD] * 3, BOI]
    alone = tiny_policy().condition([None])
    assert alone.mask.all() and alone.states.tolist() == [[BOS, PAD, PAD, BOI]]  # of the template around nothing


def test_the_pad_token_is_that_of_the_generation_config(saved: Path) -> None:
    policy = load_policy(saved)
    cond = policy.condition(TEXTS)
    assert cond.states[1, 0] == 1  # the tokenizer pads with <eos>, where nothing attends
    assert policy.condition([None] * 3, like=cond).states[1, 10:].tolist() == [PAD, PAD, PAD, BOI]


def test_negative_prompts_keep_their_own_tokens_and_length() -> None:
    policy = tiny_policy()
    cond = policy.condition(["two", "a red circle"])
    null = policy.condition([None, "a photo of a blue square"], like=cond)
    assert null.mask.sum(1).tolist() == [5, 10] and null.mask.shape == (2, 10)
    assert torch.equal(null.states[1], policy.condition(["a photo of a blue square"]).states[0])
    with pytest.raises(ValueError, match="1 texts, but `like` has 2 rows"):
        policy.condition([None], like=cond)
    rollout = policy.sample(cond, null, group=2, guidance=3.0, generator=torch.Generator().manual_seed(0))
    scores = policy.logp(cond.repeat_interleave(2), rollout.tokens, null=null.repeat_interleave(2), guidance=3.0)
    torch.testing.assert_close(scores.logp, rollout.sample_logp, atol=1e-4, rtol=0)


def test_conditions_of_different_lengths_are_joined() -> None:
    policy = tiny_policy()
    short, long = policy.condition(["two"]), policy.condition(TEXTS[2:])
    joined = Condition.cat([short, long])
    assert joined.mask.shape == (2, 14) and torch.equal(joined[[0]].trimmed().states, short.states)
    codes = random_codes(2)
    torch.testing.assert_close(
        policy.logp(joined, codes).logp[:1], policy.logp(short, codes[:1]).logp, atol=1e-4, rtol=0
    )


# ---- scoring


def random_codes(rows: int) -> Tensor:
    return torch.randint(64, (rows, 16), generator=torch.Generator().manual_seed(0))


def test_log_probs_are_those_of_one_whole_pass() -> None:
    """Prompt, then codes, through the language model at positions 0, 1, …, as the library's `forward` would run them."""
    policy, codes = tiny_policy(), random_codes(3)
    cond, _ = both(policy)
    model = policy.model
    with torch.no_grad():
        images = model.model.generation_aligner(model.model.generation_embeddings(codes[:, :-1]))
        embeds = torch.cat([model.get_input_embeddings()(cond.states), images], dim=1)
        mask = torch.cat([cond.mask, torch.ones(3, 15, dtype=torch.bool)], dim=1)
        output = model.model.language_model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        table = model.model.generation_head(output[:, 13:]).log_softmax(-1)
    scores = policy.logp(cond, codes, entropy=True)
    torch.testing.assert_close(scores.logp, table.gather(-1, codes[..., None]).squeeze(-1), atol=1e-4, rtol=0)
    assert scores.entropy is not None
    torch.testing.assert_close(scores.entropy, -(table.exp() * table).sum(-1), atol=1e-4, rtol=0)


def test_rescoring_says_what_the_sampler_knew() -> None:
    policy = tiny_policy()
    cond, null = both(policy)
    how: dict[str, Any] = {"guidance": 3.0, "temperature": 0.7, "stats": STATS}
    rollout = policy.sample(cond, null, group=2, generator=torch.Generator().manual_seed(0), **how)
    assert rollout.stats["exact_kl"].mean() > 0.1 and len(rollout.tokens.unique(dim=0)) == 6
    again = policy.rescore(cond.repeat_interleave(2), null.repeat_interleave(2), rollout.tokens, **how)
    for name in ("cond_logp", "null_logp", "sample_logp"):
        torch.testing.assert_close(getattr(again, name), getattr(rollout, name), atol=1e-4, rtol=0)
    for name in STATS:
        torch.testing.assert_close(again.stats[name], rollout.stats[name], atol=1e-4, rtol=0)


def test_images_can_begin_with_given_codes() -> None:
    policy = tiny_policy()
    cond, null = both(policy)
    whole = policy.sample(cond, null, group=1, guidance=3.0, top_k=1)
    rest = policy.sample(cond, null, group=1, guidance=3.0, top_k=1, given=whole.tokens[:, :7])
    assert torch.equal(rest.tokens, whole.tokens[:, 7:])
    torch.testing.assert_close(rest.sample_logp, whole.sample_logp[:, 7:], atol=1e-4, rtol=0)


def test_the_trunk_learns_and_nothing_else() -> None:
    policy = copy.deepcopy(tiny_policy())
    chosen, cond = policy.set_trainable(), policy.condition(TEXTS)
    policy.logp(cond, random_codes(3)).logp.sum().backward()
    assert {id(p) for p in chosen} == {id(p) for p in policy.parameters() if p.requires_grad}
    learned = {name for name, p in policy.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert learned == {name for name, _ in policy.named_parameters() if name.startswith("model.model.language_model.")}
    words = policy.trunk.embed_tokens.weight.grad.abs().sum(1).nonzero().flatten()
    assert torch.equal(words, cond.states[cond.mask].unique())


def test_bfloat16_keeps_head_and_tokenizer_in_float32(saved: Path) -> None:
    policy: Any = load_policy(saved, dtype=torch.bfloat16)
    dtypes: dict[str, set[torch.dtype]] = {}
    for name, parameter in policy.model.model.named_parameters():
        dtypes.setdefault(name.split(".")[0], set()).add(parameter.dtype)
    assert dtypes["generation_head"] == dtypes["vqmodel"] == {torch.float32}
    assert dtypes["language_model"] == {torch.bfloat16}
    cond, null = both(policy)
    rollout = policy.sample(cond, null, group=1, guidance=2.0, generator=torch.Generator().manual_seed(0))
    again = policy.logp(cond, rollout.tokens, null=null, guidance=2.0)
    assert again.logp.dtype == rollout.sample_logp.dtype == torch.float32
    assert (again.logp - rollout.sample_logp).abs().mean() < 0.2
    assert len(policy.decode(rollout.tokens)) == 3


# ---- images


def test_encoding_finds_the_codebook_entry_nearest_by_angle() -> None:
    policy = tiny_policy()
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vq = policy.model.model.vqmodel
    with torch.no_grad():
        latents = vq.quant_conv(vq.encoder(pixels)).permute(0, 2, 3, 1).reshape(2, 16, 1, 4)
    similarity = F.cosine_similarity(latents, vq.quantize.embedding.weight, dim=-1)  # (2, 16, 64)
    codes = policy.encode(pixels)
    assert torch.equal(codes, similarity.argmax(-1))
    assert not torch.equal(codes, vq.encode(pixels).image_tokens.view(2, 16))  # the library's: by distance
    with pytest.raises(ValueError, match=r"images of \(16, 16\) pixels give a code map of \(2, 2\), expected \(4, 4\)"):
        policy.encode(pixels[..., :16, :16])


# ---- full size


def full_size(dim: int, layers: int, heads: int, mlp_dim: int) -> JanusConfig:
    """Janus-Pro as published: deepseek-community/Janus-Pro-1B and -7B."""
    return JanusConfig(
        text_config=LlamaConfig(
            vocab_size=102400, hidden_size=dim, intermediate_size=mlp_dim, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=16384,
        ),
        vision_config=JanusVisionConfig(projection_dim=dim),
        vq_config=JanusVQVAEConfig(projection_dim=dim, image_token_embed_dim=dim),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("dim", "layers", "heads", "mlp_dim", "trunk"),
    [
        # layers · (4·dim² + 3·dim·mlp + 2·dim) + 102400·dim + dim
        (2048, 24, 16, 5632, 1_442_940_928),
        (4096, 30, 32, 11008, 6_490_935_296),
    ],
)
def test_published_sizes_on_the_meta_device(dim: int, layers: int, heads: int, mlp_dim: int, trunk: int) -> None:
    with torch.device("meta"):
        model = JanusForConditionalGeneration(full_size(dim, layers, heads, mlp_dim))
        policy = JanusPolicy(model, tiny_processor())
        assert policy.grid == (24, 24)
        assert sum(p.numel() for p in policy.set_trainable()) == trunk
        cond = Condition(torch.zeros(2, 20, dtype=torch.int64), torch.ones(2, 20, dtype=torch.bool))
        codes = torch.zeros(2, 576, dtype=torch.int64)
        hidden = policy.model.model.language_model(
            inputs_embeds=torch.cat([policy.prefix(cond), policy.embed_codes(codes[:, :-1])], dim=1)
        ).last_hidden_state
        assert policy.model.model.generation_head(hidden[:, 19:]).shape == (2, 576, 16384)
        assert policy.model.decode_image_tokens(codes).shape == (2, 384, 384, 3)


def test_sizes_are_read_without_the_weights(saved: Path) -> None:
    sizes, policy = read_sizes(saved), tiny_policy()
    assert sizes.parameters == sum(p.numel() for p in policy.parameters())
    assert sizes.trainable == sum(p.numel() for p in policy.set_trainable())
    assert (sizes.grid, sizes.codes, sizes.layers, sizes.kv_heads, sizes.head_dim) == ((4, 4), 64, 2, 2, 8)
    seen = []
    for module in policy.model.model.vqmodel.decoder.modules():
        module.register_forward_hook(lambda *args: seen.append(args[2].numel()))
    policy.decode(random_codes(1))
    assert max(seen) == sizes.image_elements


@pytest.mark.parametrize("size", ["1b", "7b"])
def test_config_files_have_the_published_settings(size: str) -> None:
    path = Path(__file__).parent.parent / "configs" / f"janus_pro_{size}_geneval.yaml"
    config, text = load_config(path), path.read_text(encoding="utf-8")
    assert f"--config configs/{path.name}" in text and f"hf download {config.model}" in text
    assert (config.steps, config.prompts_per_step, config.group_size, config.guidance) == (1600, 8, 16, 5.0)
    assert (config.loss.beta, config.loss.kl_reweight, config.loss.advantage_scale) == (0.03, True, "group")
    assert (config.lora.rank, config.optim.learning_rate) == ((None, 5e-6) if size == "1b" else (64, 5e-5))


# ---- folders and the hub


def test_missing_and_damaged_files(broken: Path) -> None:
    for file in ("tokenizer.json", "model.safetensors", "processor_config.json"):
        (broken / file).rename(broken / "away")
        with pytest.raises(UserError, match=f"cannot load {broken}"):
            load_policy(broken)
        (broken / "away").rename(broken / file)
    weights = load_file(broken / "model.safetensors")
    name = "model.language_model.norm.weight"
    path = broken / "model.safetensors"
    save_file({k: v for k, v in weights.items() if k != name}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"missing_keys \['{name}'\]"):
        load_policy(broken)
    save_file({**weights, name: torch.ones(7)}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"mismatched_keys.*{name}"):
        load_policy(broken)
    path.write_bytes(b"not safetensors")
    with pytest.raises(UserError, match=str(broken)):
        load_policy(broken)


def edit_config(folder: Path, part: str, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (config[part] if part else config).update(values)
    (folder / "config.json").write_text(json.dumps(config))


def test_other_model_types(broken: Path) -> None:
    edit_config(broken, "", model_type="llama")
    with pytest.raises(UserError, match="unknown model type 'llama'; known: janus"):
        load_policy(broken)
    edit_config(broken, "", model_type="multi_modality")
    with pytest.raises(
        UserError, match="use the same weights in transformers' format: deepseek-community/Janus-Pro-1B"
    ):
        load_policy(broken)


def test_parts_that_do_not_fit_each_other(broken: Path) -> None:
    edit_config(broken, "vision_config", num_image_tokens=9)
    with pytest.raises(UserError, match="num_image_tokens 9 is not the number of codes 4 × 4"):
        load_policy(broken)


def test_a_tokenizer_without_special_tokens() -> None:
    processor: Any = tiny_processor()
    processor.tokenizer.bos_token = None
    with pytest.raises(UserError, match="the tokenizer has no bos_token; save it with"):
        JanusPolicy(tiny_model(), processor)


def test_a_repository_of_the_hub(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **how: asked.append((name, how)) or str(saved)
    )
    policy: Any = load_policy("owner/Janus-1.5")
    assert policy.grid == (4, 4)
    assert asked == [("owner/Janus-1.5", {"allow_patterns": hub.FILES})]
    assert not any(name.endswith((".bin", ".pt", ".py")) for name in hub.FILES)  # no pickles and no code


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            LocalEntryNotFoundError("no"),
            r"config.json .* the hub cannot be reached; .*: hf download owner/Janus-1.5 .*, then --model Janus-1.5$",
        ),
        (
            RepositoryNotFoundError,
            "--model: no folder owner/Janus-1.5, and no such repository on the Hugging Face hub",
        ),
        (GatedRepoError, "https://huggingface.co/owner/Janus-1.5; then: hf auth login && hf download owner/Janus-1.5 "),
        (OSError(28, "No space left on device"), "No space left on device; try: hf download owner/Janus-1.5 "),
    ],
)
def test_a_repository_that_cannot_be_had(error: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(error, type):
        error = error("no", response=httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co")))

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=message):
        load_policy("owner/Janus-1.5")
