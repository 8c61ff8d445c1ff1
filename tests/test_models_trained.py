"""Which modules are trained, and how fast each learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from gcpo_t2i.cli import main
from gcpo_t2i.config import LoraConfig, OptimConfig, RewardConfig, TrainConfig, resolve_algorithm
from gcpo_t2i.data import Prompt
from gcpo_t2i.errors import UserError
from gcpo_t2i.models import load_policy
from gcpo_t2i.models.lora import Adapters
from gcpo_t2i.models.sizes import read_sizes, to_train
from gcpo_t2i.models.trained import flat, in_module, missing, rate_of, trained
from gcpo_t2i.rollout import Sampling, sample_batch
from gcpo_t2i.scoring import RewardSet
from gcpo_t2i.update import Updater
from tests.tiny import tiny_policy

MODULES = {"caption_projector": 8.0, "v_proj": 1.0}


def test_a_parameter_is_in_the_modules_on_its_way() -> None:
    value = "trunk.layers.0.self_attn.v_proj.weight"
    assert [in_module(value, name) for name in ("v_proj", "self_attn", "layers.0", "proj", "layers.1")] == [
        *(True, True, True, False, False),
    ]
    assert rate_of(value, {"self_attn": 2.0, "v_proj": 3.0, "layers": 4.0}) == 2.0  # the longest name
    assert rate_of("adapter.head.weight", MODULES) is None


def test_only_what_is_named_is_trained() -> None:
    policy = tiny_policy()
    groups = trained(policy, MODULES)
    named = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[-2] if "v_proj" in name else "caption_projector" for name in named} == set(MODULES)
    assert sum(p.numel() for p in flat(groups)) == sum(p.numel() for p in named.values())
    assert {id(p) for p in groups[8.0]} == {id(p) for p in policy.adapter.caption_projector.parameters()}
    every = trained(policy, None)
    assert list(every) == [1.0] and len(flat(every)) == len(policy.set_trainable())


def test_names_that_a_model_does_not_have() -> None:
    with pytest.raises(
        UserError, match=r"names w_proj, .* of these names; did you mean '[a-z]+_proj'.*null trains them all"
    ):
        trained(tiny_policy(), {"w_proj": 1.0})
    assert missing(tiny_policy(), {"v_proj": 1.0, "w_proj": 1.0}) == [
        "optim.modules: nothing in the model is called w_proj"
    ]
    assert missing(tiny_policy(), MODULES) == missing(tiny_policy(), None) == []


def test_adapters_are_trained_whatever_is_named() -> None:
    pytest.importorskip("peft")
    policy = tiny_policy()
    adapters = Adapters.add(policy, LoraConfig(rank=2, targets=["q_proj"]), "tiny", seed=0)
    (only,) = trained(policy, MODULES).values()
    assert len(only) == 2 * len(policy.trunk.layers) and adapters


def test_a_module_moves_by_its_factor(reward_file: Path) -> None:
    """Gradient descent at rate 1: by the gradient with factor 1, by eight times as much with 8; the head stays."""
    rewards = RewardSet.load([RewardConfig(f"{reward_file}:bright")])
    moved = []
    for factor in (1.0, 8.0):
        policy = tiny_policy()
        batch = sample_batch(policy, [Prompt("blue")], rewards, Sampling(2, 2.0), torch.Generator())
        optim = OptimConfig(modules={"caption_projector": factor, "v_proj": 1.0}, max_grad_norm=1e9)
        config = TrainConfig(algorithm="grpo", optim=optim)
        update = Updater(policy, None, config, resolve_algorithm(config)[0], Accelerator(cpu=True))
        update.optimizer = torch.optim.SGD(update.optimizer.param_groups)
        update(batch, torch.tensor([1.0, -1.0]), torch.ones_like(batch.rollout.cond_logp), lr=1.0)
        before = tiny_policy().state_dict()
        moved.append({name: value - before[name] for name, value in policy.state_dict().items()})
    assert moved[0]["adapter.caption_projector.0.weight"].abs().max() > 1e-5
    for name, value in moved[0].items():
        expected = value * 8 if "caption_projector" in name else value
        torch.testing.assert_close(moved[1][name], expected, rtol=1e-3, atol=1e-6, msg=name)
    assert not moved[0]["adapter.head.weight"].any()


def test_plans_count_what_is_trained(tiny_folder: Path) -> None:
    policy, sizes = load_policy(tiny_folder), read_sizes(tiny_folder)
    for modules in (MODULES, None):
        planned = to_train(sizes, TrainConfig(optim=OptimConfig(modules=modules)))
        assert planned.trainable == sum(p.numel() for p in flat(trained(policy, modules)))


def test_a_wrong_name_on_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["train", "--output_dir", str(tmp_path / "run"), "--optim.modules", '{"w_proj": 1}']
    assert main(command) == 2
    assert "optim.modules names w_proj" in capsys.readouterr().err
