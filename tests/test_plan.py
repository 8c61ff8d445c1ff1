"""`gcpo-t2i plan`: its counts against a counted run, its bytes against real tensors, its arithmetic by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from gcpo_t2i.cli import main
from gcpo_t2i.config import (
    CreditConfig,
    EvalConfig,
    LoraConfig,
    LossConfig,
    MonitorConfig,
    OptimConfig,
    PlanConfig,
    RewardConfig,
    validate,
)
from gcpo_t2i.data import PromptSampler, load_prompts
from gcpo_t2i.errors import UserError
from gcpo_t2i.models import attention as attentions
from gcpo_t2i.models import decoding, load_policy, teacher_forcing
from gcpo_t2i.models.attention import CAUSAL_BLOCKS
from gcpo_t2i.models.cache import Cache
from gcpo_t2i.models.llamagen import LlamaGenPolicy
from gcpo_t2i.models.lora import Adapters, trainable
from gcpo_t2i.models.sizes import Sizes, read_sizes, with_adapters
from gcpo_t2i.models.trunk import recomputed
from gcpo_t2i.parsing import load_config
from gcpo_t2i.plan import Plan, cautions, make_plan, memory, timing
from gcpo_t2i.plan.counts import Counts
from gcpo_t2i.plan.datasheet import GPUS, Gpu, Least, least_times
from gcpo_t2i.plan.memory import Memory, Precision
from gcpo_t2i.plan.show import clock
from gcpo_t2i.plan.timing import Times
from gcpo_t2i.run import EMBEDDED_MODEL, make_accelerator, model_folder
from gcpo_t2i.scoring import RewardSet
from gcpo_t2i.train import Trainer
from tests.tiny import tiny_policy

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
EMBEDDED = read_sizes(model_folder(EMBEDDED_MODEL))


def settings(tiny_folder: Path, reward_file: Path, tmp_path: Path, **changes: Any) -> PlanConfig:
    """2 prompts × 4 images of 16 codes; micro-batches of 3, 3 and 2."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of a red circle\na blue square\ntwo red square\n")
    rewards = [RewardConfig(f"{reward_file}:bright")]
    return PlanConfig(
        **{
            "model": str(tiny_folder), "train_prompts": str(prompts), "rewards": rewards, "prompts_per_step": 2,
            "group_size": 4, "micro_batch_size": 3, "output_dir": str(tmp_path / "run"), "steps": 3, "device": "cpu",
            "eval": EvalConfig(prompts=str(prompts), num_prompts=3, samples_per_prompt=2, rewards=rewards),
        }
        | changes
    )  # fmt: skip


# ---- counts


def test_counts_of_the_default_run_by_hand() -> None:
    counts = Counts.of(PlanConfig(), EMBEDDED)
    assert (counts.images, counts.tokens, counts.rows) == (64, 64 * 144, 128)
    assert (counts.micro_batches, counts.last_micro_batch) == (4, 16)
    assert counts.forward_passes == 144 + 4 + 2 * 1  # policy; the reference with and without the prompt, on 8 images
    penalised = Counts.of(PlanConfig(loss=LossConfig(beta=0.1), updates_per_rollout=2), EMBEDDED)
    assert penalised.reference_passes == 8
    assert penalised.null_passes == 4 + 8  # of the policy in the second update only: the rollout keeps its own
    assert (counts.evaluations, counts.eval_images, counts.eval_batches) == (2, 480, 8)
    assert counts.checkpoints == 3  # after 20, 40 and 60 steps


def test_counts_follow_the_settings() -> None:
    small = Counts.of(PlanConfig(processes=4, micro_batch_size=5, steps=20, eval_every=10, save_every=0), EMBEDDED)
    assert (small.prompts, small.images, small.micro_batches, small.last_micro_batch) == (2, 16, 4, 1)
    assert (small.eval_images, small.eval_batches, small.eval_share) == (480, 8, 120)  # two batches for each process
    uneven = Counts.of(PlanConfig(processes=2, eval=EvalConfig(num_prompts=130, samples_per_prompt=1)), EMBEDDED)
    assert (uneven.eval_batches, uneven.eval_share) == (3, 120)  # 60, 60 and 10: the first takes two of them
    assert (small.evaluations, small.checkpoints) == (3, 1)  # step 20 is the last, whose evaluation is there anyway
    unwatched = MonitorConfig(kl=False)
    plain = Counts.of(PlanConfig(algorithm="grpo", guidance=1, monitor=unwatched), EMBEDDED)
    assert (plain.branches, plain.eval_branches, plain.reference_passes, plain.rounds) == (1, 1, 0, 1)
    contrasted = Counts.of(PlanConfig(guidance=1), EMBEDDED)
    assert (contrasted.branches, contrasted.eval_branches) == (2, 1)  # the credit needs the null branch, scores do not
    assert Counts.of(PlanConfig(algorithm="dapo"), EMBEDDED).rounds == 3


def test_a_step_that_is_sampled_in_parts_by_hand() -> None:
    config = PlanConfig(rollout_batch_size=24)
    counts, whole = Counts.of(config, EMBEDDED), of(PlanConfig(), CUDA)
    assert (counts.images, counts.at_once, counts.parts, counts.last_part, counts.rows) == (64, 24, 3, 16, 48)
    assert counts.forward_passes == 3 * 144 + 4 + 2 * 1
    assert of(config, CUDA).cache * 128 == whole.cache * 120  # that of an evaluation, 60 images at once
    fewer = replace(config, eval=EvalConfig(batch_size=8))
    assert of(fewer, CUDA).cache * 128 == whole.cache * 48
    assert of(fewer, CUDA).log_probs == whole.log_probs
    more = Counts.of(PlanConfig(rollout_batch_size=128), EMBEDDED)
    assert (more.at_once, more.parts, more.last_part) == (64, 1, 64)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": LossConfig(beta=0.1), "updates_per_rollout": 2},
        {"monitor": MonitorConfig(kl=False)},
        {"rollout_batch_size": 4},
        {"updates_per_rollout": 2, "scoring": "conditional"},
        {"updates_per_rollout": 2, "credit": CreditConfig(source="replay"), "loss": LossConfig(beta=0)},
        {"algorithm": "grpo", "guidance": 1.0, "credit": CreditConfig(source="replay")},
    ],
    ids=["default", "penalised", "unwatched", "in parts", "conditional", "replay", "unguided"],
)
def test_forward_passes_are_those_of_a_real_step(
    tiny_folder: Path, reward_file: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Every pass, over a prefix, a position or a micro-batch, runs the activation in the MLP of the first layer once."""
    config = settings(tiny_folder, reward_file, tmp_path, **changes)
    trainer, calls = Trainer(config), []
    policies: list[Any] = [trainer.policy, *([trainer.update.reference] if trainer.update.reference else [])]
    for policy in policies:
        policy.trunk.layers[0].mlp.act_fn.register_forward_hook(lambda *_: calls.append(1))
    trainer.step()
    assert len(calls) == Counts.of(config, read_sizes(tiny_folder)).forward_passes


# ---- memory


def test_parameters_are_counted_from_the_files(tiny_folder: Path) -> None:
    policy, sizes = load_policy(tiny_folder), read_sizes(tiny_folder)
    assert isinstance(policy, LlamaGenPolicy)
    assert sizes.parameters == sum(p.numel() for p in policy.parameters())
    assert sizes.trainable == sum(p.numel() for p in policy.set_trainable())
    # 2 layers of q, k, v, o 32², gate, up, down 32·96, two norms; embedding, last norm, head; projector 16·32 + 32²
    assert sizes.trainable == 2 * (4 * 32**2 + 3 * 32 * 96 + 64) + 32 * 32 + 32 + 32 * 32 + 16 * 32 + 32**2


def test_a_damaged_model_is_one_line(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model folder at"):
        read_sizes(tmp_path / "nowhere")
    (tmp_path / "model_index.json").write_text((tiny_folder / "model_index.json").read_text())
    with pytest.raises(UserError, match="the model folder is incomplete"):
        read_sizes(tmp_path)


@pytest.mark.parametrize("guided", [True, False])
def test_cache_bytes_are_those_that_decoding_holds(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, guided: bool
) -> None:
    seen: list[int] = []
    step = decoding.decode_step

    def watched(layers: Any, x: Any, slot: Any, rotary: Any, cache: Cache, span: int) -> Any:
        held = [tensor.untyped_storage().nbytes() for tensor in (*cache.keys, *cache.values, cache.spare, cache.bias)]
        seen.append(sum(held))
        return step(layers, x, slot, rotary, cache, span)

    monkeypatch.setattr(decoding, "decode_step", watched)
    policy = tiny_policy()
    cond = policy.condition(["a photo of a red circle", "two"])  # 6 caption tokens, and 15 codes fed back: one block
    null = policy.condition([None, None], like=cond) if guided else None
    policy.sample(cond, null, group=3, guidance=2.0 if guided else 1.0)
    rows = 12 if guided else 6
    assert max(seen) == memory.cache_bytes(read_sizes(tiny_folder), rows, 6, Precision(), grows=True)
    # keys and values of 2 layers and a spare tensor, 2 heads of 16 channels, 32 positions; the mask of each head
    assert max(seen) == (2 * 2 + 1) * rows * 2 * 32 * 16 * 4 + rows * 2 * 32 * 4


def saved_bytes(
    layers: int, lower: bool, attention: str, batch: int, rank: int | None = None, recomputes: bool = False
) -> int:
    """Distinct memory that autograd keeps of one teacher-forced pass, parameters and their casts left out."""
    policy: Any = deeper_policy(layers)
    if rank:
        policy.trunk.to(torch.bfloat16 if lower else torch.float32)
        Adapters.add(policy, LoraConfig(rank=rank), "base", seed=0)
    policy.trunk.set_attn_implementation(attention)
    trainable(policy)
    cond = policy.condition(["a photo of a red circle"] * batch)
    tokens = torch.zeros(batch, 16, dtype=torch.long)
    shapes = {tuple(p.shape) for p in policy.parameters()} | {tuple(p.shape[::-1]) for p in policy.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tuple(tensor.shape) not in shapes:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=lower), recomputed(policy, recomputes):
            scores = policy.logp(cond, tokens)
        assert scores.logp.requires_grad  # the graph, and with it what it keeps, is alive here
        return sum(kept.values())


def deeper_policy(layers: int) -> LlamaGenPolicy:
    small = tiny_policy()
    return LlamaGenPolicy.build(
        tokenizer=small.tokenizer,
        vq_model=small.vq,
        grid=(4, 4),
        caption_tokens=8,
        dim=32,
        layers=layers,
        heads=2,
        kv_heads=2,
        text_dim=16,
        text_layers=1,
    ).eval()


@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("attention", [CAUSAL_BLOCKS, "sdpa"])
def test_activations_of_a_layer_are_those_that_autograd_keeps(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, lower: bool, attention: str
) -> None:
    """The difference that one more layer makes, so that embedding and head drop out; attention in three blocks."""
    monkeypatch.setattr(attentions, "BLOCK", 8)
    batch, prefix, positions = 5, 6, 6 + 16 - 1
    kept = saved_bytes(3, lower, attention, batch) - saved_bytes(2, lower, attention, batch)
    sizes, precision = replace(read_sizes(tiny_folder), trainable=0), Precision(lower, attention == CAUSAL_BLOCKS)

    def expected(layers: int) -> int:
        deep = replace(sizes, layers=layers)
        return memory.activation_bytes(deep, batch, prefix, precision) + memory.attention_bytes(
            deep, batch, prefix, precision
        )

    # What the formula leaves out: a float32 per position of two norms, and of each head of fused attention.
    scalars = 4 * batch * positions * (2 + (2 if attention == "sdpa" else 0))
    assert kept - scalars == expected(3) - expected(2)


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("attention", [CAUSAL_BLOCKS, "sdpa"])
@pytest.mark.parametrize("rank", [None, 3])
def test_activations_with_adapters_and_recomputed_layers(
    tiny_folder: Path, lower: bool, attention: str, rank: int | None, recomputes: bool
) -> None:
    """The difference that one more layer makes, as above."""
    if rank:
        pytest.importorskip("peft", reason="LoRA needs the package peft")
    batch, prefix, positions = 5, 6, 6 + 16 - 1
    kept = saved_bytes(3, lower, attention, batch, rank, recomputes)
    kept -= saved_bytes(2, lower, attention, batch, rank, recomputes)
    sizes = replace(read_sizes(tiny_folder), trainable=0)
    precision = Precision(lower, attention == CAUSAL_BLOCKS, 7 * (rank or 0), recomputes)

    def expected(layers: int) -> int:
        deep = replace(sizes, layers=layers)
        return memory.activation_bytes(deep, batch, prefix, precision) + memory.attention_bytes(
            deep, batch, prefix, precision
        )

    scalars = 0 if recomputes else 4 * batch * positions * (2 + (2 if attention == "sdpa" else 0))
    assert kept - scalars == expected(3) - expected(2)


def test_memory_of_adapters_by_hand() -> None:
    lora = LoraConfig(rank=4, targets=["q_proj", "mlp.down_proj"])
    sizes = with_adapters(EMBEDDED, lora)
    count = 6 * 4 * (192 + 192 + 512 + 192)  # layers, rank; inputs and outputs of the two projections
    assert (sizes.trainable, sizes.parameters) == (count, EMBEDDED.parameters + count)
    config = PlanConfig(lora=lora)
    parts = Memory.of(config, sizes, Counts.of(config, sizes), 16, CUDA, 0, 0)
    exact = EMBEDDED.float_parameters
    assert parts.weights == 4 * (count + exact) + 2 * (EMBEDDED.parameters - exact)
    assert (parts.reference, parts.gradients, parts.optimizer) == (0, 4 * count, 8 * count)
    assert parts.activations < of(PlanConfig(), CUDA).activations
    recomputed = replace(config, gradient_checkpointing=True)
    again = Memory.of(recomputed, sizes, Counts.of(recomputed, sizes), 16, CUDA, 0, 0)
    assert again.activations < parts.activations / 3


def test_adapters_are_counted_as_they_are(tiny_folder: Path) -> None:
    pytest.importorskip("peft", reason="LoRA needs the package peft")
    policy, lora = load_policy(tiny_folder), LoraConfig(rank=3)
    Adapters.add(policy, lora, "base", seed=0)
    sizes = with_adapters(read_sizes(tiny_folder), lora)
    assert sizes.trainable == sum(p.numel() for p in trainable(policy))
    assert sizes.parameters == sum(p.numel() for p in policy.parameters())  # pyright: ignore[reportAttributeAccessIssue]


def of(config: PlanConfig, device: torch.device, **measured: int) -> Memory:
    counts = Counts.of(config, EMBEDDED)
    return Memory.of(config, EMBEDDED, counts, 16, device, measured.get("libraries", 0), measured.get("rewards", 0))


def test_memory_of_the_default_run_by_hand() -> None:
    parts = of(PlanConfig(), CPU, libraries=7, rewards=5)
    n, t = 4_549_059, 2_908_608
    assert (parts.weights, parts.reference, parts.gradients, parts.optimizer) == (4 * n, 4 * n, 4 * t, 8 * t)
    tensor = 128 * 6 * 160 * 32 * 4  # rows, heads, 16 + 143 positions in blocks of 32, channels
    # keys and values of 6 layers, one of them being copied, and the mask of each head
    assert parts.cache == (12 + 1) * tensor + 6 * 128 * 160 * 4
    assert parts.engine == 4 * 6 * 192 * (4 * 192 + 3 * 512)  # q, k, v, o; gate, up, down
    assert parts.logits == 3 * 4 * 16 * 144 * 512
    blocks = 80 * 80, 79 * 159  # queries × keys of 159 positions
    assert parts.attention == (6 * sum(blocks) + 3 * blocks[1]) * 16 * 6 * 4
    assert parts.activations == 16 * 159 * 4 * (6 * (10 * 192 + 4 * 512) + 3 * 192)
    assert (
        parts.peak == parts.resident + parts.cache + parts.engine + parts.logits + parts.activations + parts.attention
    )
    assert parts.resident == 12 + 8 * n + 12 * t + 64 * 144 * (40 + 4 * 192)


def test_memory_on_a_gpu() -> None:
    gpu, cpu = of(PlanConfig(), CUDA), of(PlanConfig(), CPU)
    assert gpu.attention == 0  # fused
    # bfloat16, no copy, one mask for all heads
    assert gpu.cache * 13 == (cpu.cache - 6 * 128 * 160 * 4) // 2 * 12 + 13 * 128 * 160 * 2
    assert gpu.peak == gpu.resident + max(gpu.cache + gpu.engine, gpu.logits + gpu.activations)
    assert gpu.engine * 2 == cpu.engine
    in_float32 = of(PlanConfig(dtype="float32"), CUDA).cache
    assert in_float32 * 13 == (cpu.cache - 6 * 128 * 160 * 4) * 12 + 13 * 128 * 160 * 4
    assert of(PlanConfig(monitor=MonitorConfig(kl=False)), CPU).reference == 0
    wide = PlanConfig(eval=EvalConfig(batch_size=100))  # evaluation holds more rows than training
    assert of(wide, CPU).cache * 128 == cpu.cache * 200


def test_logits_stay_within_the_scoring_budget() -> None:
    large = replace(EMBEDDED, codes=16384, grid=(24, 24))
    assert memory.logit_bytes(large, 16) == 3 * 4 * teacher_forcing.SCORE_BUDGET
    assert (
        memory.logit_bytes(replace(large, codes=1 << 21), 16) == 3 * 4 * 16 << 21
    )  # one position of each image at least


# ---- time


def test_a_run_is_its_steps_evaluations_and_checkpoints() -> None:
    times = Times(rollout=2, decode=0.5, reward=0.25, update=1, replay=0.25, evaluation=10, checkpoint=3)
    counts = Counts.of(PlanConfig(algorithm="dapo"), EMBEDDED)
    assert times.step == 4
    assert times.run(counts) == 60 * 4 + 2 * 10 + 3 * 3
    assert times.run(counts, rounds=3) == 60 * (4 + 2 * 2.75) + 2 * 10 + 3 * 3  # an update is never repeated


def test_scaling_where_everything_takes_one_second(
    tiny_folder: Path, reward_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def second(self: timing.Stopwatch, call: Any) -> float:
        call()
        return 1.0

    monkeypatch.setattr(timing.Stopwatch, "once", second)
    config = settings(tiny_folder, reward_file, tmp_path, updates_per_rollout=2, credit=CreditConfig(source="replay"))
    times = planned(config)
    assert times.rollout == 16  # prefill, then 15 positions, in one block of the cache
    assert times.decode == pytest.approx(8 / 8)  # 8 images were decoded at once
    assert times.reward == pytest.approx(8 / 2)  # the 2 images of the small rollout were scored at once
    assert times.update == pytest.approx(2 * 1)  # a micro-batch takes no longer than the optimizer step in it
    assert times.replay == pytest.approx(2 * 8 / 3)  # 3 images were scored again
    assert times.evaluation == pytest.approx(times.rollout + 6 / 8 + 6 / 2)  # its one batch is 6 images
    assert times.checkpoint == pytest.approx(1)
    assert planned(replace(config, prompts_per_step=3, rollout_batch_size=8)).rollout == 2 * 16  # parts of 8 and 4


def planned(config: PlanConfig) -> Times:
    times = make_plan(config).times
    assert times is not None
    return times


def test_measuring_changes_no_weight(tiny_folder: Path, reward_file: Path, tmp_path: Path) -> None:
    config = settings(tiny_folder, reward_file, tmp_path, optim=OptimConfig(weight_decay=0.5))
    policy: Any = load_policy(tiny_folder)
    before = {name: parameter.clone() for name, parameter in policy.named_parameters()}
    accelerator = make_accelerator(config)
    sampler = PromptSampler(load_prompts(config.train_prompts), 0)
    rewards = RewardSet.load(config.rewards)
    sizes = read_sizes(tiny_folder)
    measured = timing.measure(config, sizes, Counts.of(config, sizes), policy, rewards, rewards, sampler, accelerator)
    assert all(seconds > 0 for name, seconds in measured.parts().items() if name not in ("replay", "update"))
    assert measured.replay == 0
    assert all(torch.equal(parameter, before[name]) for name, parameter in policy.named_parameters())


@pytest.mark.parametrize(("seconds", "text"), [(0.1234, "0.123 s"), (90, "90 s"), (438, "7.3 min"), (9000, "2.5 h")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


# ---- warnings and errors


def warned(free: int | None = None, **changes: Any) -> str:
    config = PlanConfig(**changes)
    counts = Counts.of(config, EMBEDDED)
    return "\n".join(cautions(config, Plan("cpu", EMBEDDED, counts, of(config, CPU), free)))


def test_warnings() -> None:
    assert warned() == ""
    assert "group_size 2" in warned(group_size=2)
    assert "more than the 64 images of a process: 64 does the same" in warned(micro_batch_size=65)
    assert warned(micro_batch_size=64, rollout_batch_size=64) == ""
    assert "rollout_batch_size 72 is more than the 64 images" in warned(rollout_batch_size=72)
    assert "share its cores" in warned(processes=2)
    needed = of(PlanConfig(), CPU).peak
    assert warned(free=needed) == "" and "lower --micro_batch_size" in warned(free=needed - 1)


def test_a_disk_too_small_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gcpo_t2i.plan.free_disk", lambda output_dir: 3 * 12 * 2_908_608 - 1)
    assert "3 checkpoints" in warned() and "keep_last" in warned()
    monkeypatch.setattr("gcpo_t2i.plan.free_disk", lambda output_dir: 3 * 12 * 2_908_608)
    assert warned() == ""


def test_processes_that_do_not_divide_are_refused_with_the_words_of_train(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError) as planning:
        validate(PlanConfig(processes=3))
    assert str(planning.value) == "prompts_per_step 8 cannot be split evenly over 3 processes; use a multiple"
    monkeypatch.setattr(Accelerator, "num_processes", 3)
    with pytest.raises(UserError) as training:
        make_accelerator(PlanConfig(device="cpu"))
    assert str(training.value) == str(planning.value)


# ---- the command


@pytest.fixture
def command(tiny_folder: Path, reward_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    config = settings(tiny_folder, reward_file, tmp_path)
    reward = json.dumps([{"name": config.rewards[0].name}])
    return [
        *("plan", "--model", config.model, "--train_prompts", config.train_prompts, "--eval.prompts"),
        *(config.train_prompts, "--rewards", reward, "--eval.rewards", reward, "--device", "cpu"),
        *("--prompts_per_step", "2", "--group_size", "4", "--eval.num_prompts", "3"),
    ]


def test_the_command_prints_tables_and_leaves_nothing(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(tmp_path.iterdir())
    assert main(command) == 0
    out = capsys.readouterr().out
    for line in ("A step", "rows that decode at once", "Memory of a process", "peak", "Time", "rollout", "run"):
        assert f"\n{line}" in out
    assert set(tmp_path.iterdir()) == before


def test_json_has_the_numbers_of_the_tables(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--json", "--measure", "false"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["counts"]["images"] == 8 and plan["counts"]["rows"] == 16 and plan["times"] is None
    assert plan["memory"]["peak"] > plan["memory"]["libraries"] > 0
    assert plan["sizes"]["grid"] == [4, 4]


def test_a_gpu_can_be_planned_for_without_one(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = [*command, "--json", "--device", "cuda"]
    assert main([*elsewhere, "--measure", "false"]) == 0
    assert json.loads(capsys.readouterr().out)["memory"]["attention"] == 0
    if not torch.cuda.is_available():
        assert main(elsewhere) == 2
        assert "device 'cuda' is not there" in capsys.readouterr().err


JANUS = Sizes(
    grid=(24, 24), codes=16384, caption_tokens=64, dim=2048, layers=24, heads=16, kv_heads=16, head_dim=128, mlp_dim=5632,
    parameters=2_076_636_811, trainable=1_442_940_928, tensors={}, float_parameters=109_650_571, image_elements=18_874_368,
)  # fmt: skip
PUBLISHED = {
    "janus_pro_1b_geneval": JANUS,
    "janus_pro_7b_geneval": replace(
        JANUS, dim=4096, layers=30, heads=32, kv_heads=32, mlp_dim=11008, parameters=7_407_773_323, trainable=6_490_935_296,
        float_parameters=155_789_963,
    ),
    "llamagen_xl_hps": Sizes(
        grid=(16, 16), codes=16384, caption_tokens=120, dim=1280, layers=36, heads=20, kv_heads=20, head_dim=64, mlp_dim=3584,
        parameters=2_050_435_611, trainable=777_678_080, tensors={}, float_parameters=48_984_347, image_elements=8_388_608,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "processes", "settings", "said"),
    [
        ("janus_pro_1b_geneval", 1, {}, "63.9 GiB on one"),
        ("janus_pro_1b_geneval", 8, {}, "37.6 on each of 8"),
        ("janus_pro_1b_geneval", 8, {"sharded": True}, "20.6 on each of 8 with fsdp2.yaml"),
        ("janus_pro_7b_geneval", 8, {}, "25.7 GiB on each of 8"),
        ("janus_pro_7b_geneval", 1, {}, "91.3 (141 GB)"),
        ("janus_pro_7b_geneval", 1, {"rollout_batch_size": 32}, "35.1 with --rollout_batch_size 32"),
        ("janus_pro_7b_geneval", 8, {"sharded": True, "lora": LoraConfig()}, "8 with fsdp2.yaml 70.2"),
        ("llamagen_xl_hps", 1, {}, "33.8 GiB on one"),
        ("llamagen_xl_hps", 8, {}, "29.5 on each of 8"),
        ("llamagen_xl_hps", 8, {"sharded": True}, "15.8 on each of 8 with fsdp2.yaml"),
    ],
)
def test_memory_that_the_config_files_name_is_what_is_planned(
    name: str, processes: int, settings: dict[str, Any], said: str
) -> None:
    path = Path(__file__).parent.parent / "configs" / f"{name}.yaml"
    config = PlanConfig(**(vars(load_config(path)) | {"processes": processes, "gpu": "h100"} | settings))
    sizes = with_adapters(PUBLISHED[name], config.lora)
    counts = Counts.of(config, sizes)
    peak = Memory.of(config, sizes, counts, sizes.caption_tokens, CUDA, 0, 0).peak
    head = " ".join(path.read_text(encoding="utf-8").replace("#", " ").split())
    assert said in head and f"{peak / 2**30:.1f}" in said
    if not settings:
        hours = counts.steps * least_times(config, sizes, counts, sizes.caption_tokens, GPUS["h100"]).step / 3600
        assert (
            f"{hours:.1f}" in head.partition("time: ")[2].partition("expected:")[0] or hours > 6
        )  # 7B on one: in parts


def test_least_times_by_hand(tiny_folder: Path, reward_file: Path, tmp_path: Path) -> None:
    """Steps on a GPU that reads 1 byte/s and multiplies at 1/s, each time with the other one free."""
    sizes = replace(EMBEDDED, grid=(1, 3), codes=5, dim=4, layers=2, heads=2, kv_heads=1, head_dim=2, mlp_dim=3)
    config = settings(tiny_folder, reward_file, tmp_path, guidance=2.0, scoring="conditional", micro_batch_size=4)
    layers, head, rows = 2 * 4 * (2 * 4 + 2 * 2 + 3 * 3), 4 * 5, 16  # 168, 20, 8 images × 2 branches
    filled = 8 + 9  # after a prefix of 7, the 2nd and the 3rd code attend to so many positions
    read = 2 * (2 * layers + 4 * head) + 2 * 2 * 2 * 2 * rows * filled
    products = rows * (2 * (layers + head) * 2 + 4 * 2 * 4 * filled)
    image = 2 * layers * 9 + 2 * head * 3 + 2 * 2 * 4 * 9**2
    slow_memory, slow_products = Gpu(1, 1.0, 1e30), Gpu(1, 1e30, 1.0)

    def least(gpu: Gpu, **changes: Any) -> Least:
        changed = replace(config, **changes)
        return least_times(changed, sizes, Counts.of(changed, sizes), 7, gpu)

    assert least(slow_memory).rollout == read and least(slow_products).rollout == products
    kl = config.monitor.images  # 8 images in two passes of 4, as many as are trained on
    assert kl == 8 and least(slow_products).update == 8 * image * (3 + 1)
    assert least(slow_products, monitor=MonitorConfig(kl=False)).update == 8 * image * 3
    lora, kept = LoraConfig(rank=2), MonitorConfig(kl=False)
    assert least(slow_products, lora=lora, monitor=kept, gradient_checkpointing=True).update == 8 * image * 3
    assert least(slow_memory, rollout_batch_size=4).rollout == read + 2 * (2 * layers + 4 * head)  # in two parts


def test_a_gpu_that_is_not_here_by_its_data_sheet(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = [word for word in command if word not in ("--device", "cpu")]
    assert main([*elsewhere, "--gpu", "h200"]) == 0
    out = capsys.readouterr().out
    assert "Time at least, by the data sheet of the h200" in out and "139.00 GB" in out and "warning: memory" not in out
    assert main([*elsewhere, "--gpu", "a100", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["device"] == "a100" and plan["times"] is None and plan["free_memory"] == 79 << 30
    assert plan["least"]["rollout"] > 0 and plan["least"]["update"] > 0


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--gpu", "h100"], "gpu h100 takes the place of device 'cpu'; drop one of them"),
        (["--gpu", "h1000"], "gpu: 'h1000'"),
        (["--device", "cuda;0", "--measure", "false"], "device 'cuda;0' is unknown; use cpu, cuda or cuda:N"),
        (["--processes", "3"], "prompts_per_step 2 cannot be split evenly over 3 processes"),
        (["--group_size", "1"], "group_size 1 leaves no group"),
        (["--model", "nowhere"], "no model folder at nowhere"),
        (["--train_prompts", "missing.txt"], "prompt file 'missing.txt' does not exist"),
        (["--rewards", '[{"name": "clup"}]'], "reward 'clup' is unknown"),
        (["--proceses", "2"], "unknown option '--proceses'; did you mean '--processes'?"),
    ],
)
def test_bad_input_is_one_line(
    command: list[str], capsys: pytest.CaptureFixture[str], extra: list[str], message: str
) -> None:
    assert main([*command, *extra]) == 2
    assert message in capsys.readouterr().err


def test_out_of_memory_while_measuring_names_the_settings(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("2 GiB")

    monkeypatch.setattr("gcpo_t2i.plan.measure", full)
    assert main(command) == 2
    assert "out of memory on cpu while measuring; lower --micro_batch_size (now 16)" in capsys.readouterr().err
