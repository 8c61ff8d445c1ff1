"""Linear layers of a rollout: copies and adapters give what the layers give that they stand for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from gcpo_t2i.config import LoraConfig
from gcpo_t2i.models import layers
from gcpo_t2i.models.lora import Adapters
from tests.test_models_decoding import LowRank
from tests.test_models_llamagen import tiny_policy


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_copied_projection_is_its_layers_side_by_side(bias: bool) -> None:
    torch.manual_seed(0)
    linears = [nn.Linear(8, width, bias=bias) for width in (8, 4, 4)]
    x = torch.randn(3, 8)
    together = torch.cat([linear(x) for linear in linears], dim=-1)
    for copied in (True, False):
        torch.testing.assert_close(layers.projection(linears, copied)(x), together)
    wrapped = layers.projection([*linears[:2], LowRank(linears[2])], True)  # nobody's: called as it is
    torch.testing.assert_close(wrapped(x)[:, :12], together[:, :12])
    assert (wrapped(x)[:, 12:] - together[:, 12:]).abs().max() > 0.1


@torch.no_grad()
def test_a_copy_is_made_where_it_is_small_or_in_another_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    trunk: Any = tiny_policy().trunk
    assert layers.copies(trunk)
    monkeypatch.setattr(layers, "COPY_BYTES", 1000)
    assert not layers.copies(trunk)
    with torch.autocast("cpu", torch.bfloat16):
        assert layers.copies(trunk)
        found: Any = layers.projection([trunk.layers[0].self_attn.q_proj], True)
    assert found.keywords["weight"].dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("lower", [False, True])
def test_the_norm_is_that_of_transformers(lower: bool) -> None:
    """By hand: (3, 4) has the mean square 12.5, and epsilon makes it 16; in bfloat16 within its precision."""
    norm = LlamaRMSNorm(2, eps=3.5)
    norm.weight.copy_(torch.tensor([1.0, -2.0]))
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    with torch.autocast("cpu", torch.bfloat16, enabled=lower):
        found = layers.rms_norm(norm)(x.bfloat16() if lower else x)
    assert found.dtype == (torch.bfloat16 if lower else torch.float32)
    torch.testing.assert_close(found.float(), torch.tensor([[0.75, -2.0], [0.0, 0.0]]))
    wide, x = LlamaRMSNorm(64), torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layers.rms_norm(wide)(x), wide(x))


def adapted_attention(targets: list[str]) -> tuple[Any, Any, Adapters]:
    """The first layer's attention with adapters that do something, the policy, and its adapters."""
    policy: Any = copy.deepcopy(tiny_policy())
    adapters = Adapters.add(policy, LoraConfig(rank=2, targets=targets), "base", seed=0)
    torch.manual_seed(1)
    for name, parameter in policy.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_()
    return policy.trunk.layers[0].self_attn, policy, adapters


@torch.no_grad()
@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("targets", [["q_proj", "k_proj", "v_proj"], ["k_proj"]])
def test_adapters_of_several_layers_are_two_products(
    monkeypatch: pytest.MonkeyPatch, targets: list[str], copied: bool
) -> None:
    attention, _, _ = adapted_attention(targets)
    three = [attention.q_proj, attention.k_proj, attention.v_proj]
    x = torch.randn(3, attention.q_proj.in_features, generator=torch.Generator().manual_seed(0))
    expected = torch.cat([module(x) for module in three], dim=-1)
    without = torch.cat(
        [
            module.get_base_layer()(x) if name in targets else module(x)
            for name, module in zip(["q_proj", "k_proj", "v_proj"], three, strict=True)
        ],
        dim=-1,
    )
    found = layers.projection(three, copied)
    for module in attention.modules():  # from here on nobody calls an adapter
        if type(module).__module__ == "peft.tuners.lora.layer":
            monkeypatch.setattr(module, "forward", None)
    torch.testing.assert_close(found(x), expected, atol=1e-5, rtol=1e-5)
    assert (expected - without).abs().max() > 0.1
    assert layers.low_rank(three, torch.float32)[0].shape == (2 * len(targets), x.shape[1])
    norm = LlamaRMSNorm(x.shape[1])
    norm.weight.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(1))
    after = layers.projection(three, copied)(norm(x))
    torch.testing.assert_close(layers.normed(norm, three, copied)(x), after, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lower", [False, True])
def test_a_layer_is_added_to_the_residual(bias: bool, lower: bool) -> None:
    torch.manual_seed(0)
    linear, residual, x = nn.Linear(8, 4, bias=bias), torch.randn(3, 4), torch.randn(3, 8)
    for copied in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=lower):
            found = layers.added(linear, copied)(residual, x)
            assert (
                torch.equal(found, residual + linear(x)) if lower else (found - residual - linear(x)).abs().max() < 1e-6
            )
        assert found.dtype == torch.float32  # the residual is not rounded


@torch.no_grad()
def test_adapters_that_are_off_or_merged_are_left_to_peft() -> None:
    attention, _, adapters = adapted_attention(["q_proj"])
    x = torch.randn(3, attention.q_proj.in_features, generator=torch.Generator().manual_seed(0))
    with adapters.handle.disable_adapter():
        torch.testing.assert_close(layers.projection([attention.q_proj], True)(x), attention.q_proj(x))
    attention.q_proj.merge()
    torch.testing.assert_close(layers.projection([attention.q_proj], True)(x), attention.q_proj(x))
