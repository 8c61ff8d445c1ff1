"""Settings of `gcpo-t2i train`."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gcpo_t2i.config.base import ConfigError, bounded, check_resume, suggest

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class RewardConfig:
    """One reward of the weighted sum."""

    name: str
    """geneval, clip, aesthetic, pickscore, hps or remote (see docs/rewards.md); or your own as pkg.module:name or
    path/to/file.py:name."""
    weight: float = 1.0
    """Its factor in the sum of all rewards."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Its settings, for instance {score: dense} for geneval (strict, partial or dense)."""


@dataclass
class CreditConfig:
    """Which tokens of an image get how much of its advantage."""

    rule: str | None = None
    """uniform, guidance, random (guidance weights in shuffled places), entropy (of the policy), or stage (difference from
    images of opposite advantage); null = what the algorithm uses."""
    source: Literal["rollout", "replay"] = "rollout"
    """Where the log-probs that are compared come from: from sampling, for free, or scored again before every update by the
    policy as it is then, at the price of two passes (for updates_per_rollout above 1)."""
    contrast: str = "k3"
    """How the predictions with and without the prompt are compared: k3, exact_kl, abs, log_ratio or js."""
    normalizer: str = "power_rank"
    """How contrasts become weights with mean 1: power_rank, mean, softmax or none."""
    top: float = bounded(0.4, "in (0, 1)")
    """power_rank: this share of an image's tokens ..."""
    mass: float = bounded(0.8, "in (0, 1)")
    """power_rank: ... holds this share of its credit; equal to credit.top means uniform credit."""
    temperature: float = bounded(1.0, "> 0")
    """softmax: temperature, in nats; higher is more uniform."""


@dataclass
class LossConfig:
    """The policy loss; null leaves to the algorithm what it defines itself."""

    surrogate: str | None = None
    """Importance ratio that is clipped: token (per token) or sequence (per image, as in GSPO)."""
    averaging: str | None = None
    """sequence = every image weighs the same, token = every token weighs the same."""
    advantage_scale: str | None = "batch"
    """Rewards minus their group's mean are divided by the standard deviation of the batch, of the group (as in the papers; a
    group whose images hardly differ then counts as much as any), or by none; null = what the algorithm uses."""
    clip_low: float | None = bounded(None, "in (0, 1]")
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float | None = bounded(None, "> 0")
    """The ratio is clipped above at 1 + clip_high."""
    beta: float = bounded(0.0, ">= 0")
    """Factor of the KL divergence to the starting model; 0 = no KL term."""
    kl_reweight: bool = False
    """Halve the KL penalty on tokens with much credit (needs beta > 0)."""
    entropy_reward: float = bounded(0.0, ">= 0")
    """Factor of STAGE's entropy reward, which prefers, among the best images of a group, those whose entropy is that of the
    starting model; 0 = none (and no second model for it)."""
    entropy_coef: float = bounded(0.0, ">= 0")
    """Factor of the entropy bonus."""


def default_modules() -> dict[str, float]:
    return {"caption_projector": 8.0, "v_proj": 1.0, "o_proj": 1.0, "gate_proj": 1.0, "up_proj": 1.0, "down_proj": 1.0}


@dataclass
class OptimConfig:
    """AdamW, its learning rate, and what is trained."""

    learning_rate: float = bounded(3e-4, "> 0")
    """Peak learning rate."""
    betas: tuple[float, float] = (0.95, 0.99)
    """Decay of the running mean of the gradient and of its square. The gradient is mostly noise: slower means drift less."""
    weight_decay: float = bounded(0.0, ">= 0")
    """Decoupled weight decay."""
    warmup_steps: int = bounded(10, ">= 0")
    """Steps over which the learning rate rises linearly from 0."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up: cosine falls to 0 at the last step."""
    max_grad_norm: float = bounded(1.0, "> 0")
    """Gradients longer than this are scaled down to it."""
    modules: dict[str, float] | None = field(default_factory=default_modules)
    """The modules that are trained, by name, each with a factor on its learning rate: {v_proj: 1, ...}; null = all that the
    model's family trains, at one rate. In the embedded model the gradients of head, code embeddings, queries and keys are
    noise, and those of the caption projector say most. Without effect on adapters (lora.rank)."""


@dataclass
class LoraConfig:
    """Low-rank adapters (LoRA) in place of training the weights themselves; needs pip install "gcpo-t2i[lora]"."""

    rank: int | None = bounded(None, "> 0")
    """Rank of the adapters; null = no adapters, the weights are trained."""
    alpha: float = bounded(32.0, "> 0")
    """What an adapter adds is scaled by alpha / rank."""
    targets: list[str] = field(default_factory=lambda: list(PROJECTIONS))
    """Linear layers of the trunk that get an adapter, by the end of their names."""


def default_eval_rewards() -> list[RewardConfig]:
    return [RewardConfig("geneval", kwargs={"score": "strict"}), RewardConfig("clip"), RewardConfig("aesthetic")]


@dataclass
class EvalConfig:
    """Evaluation on held-out prompts, before the first step, every eval_every steps, and at the end."""

    prompts: str = "shapesworld:heldout"
    """Where the prompts come from; see train_prompts."""
    num_prompts: int = bounded(240, "> 0")
    """How many prompts are used, balanced over their tags."""
    samples_per_prompt: int = bounded(2, "> 0")
    """Images per prompt."""
    batch_size: int = bounded(60, "> 0")
    """Images sampled at a time."""
    seed: int = bounded(4321, ">= 0")
    """Seed of the evaluation's own random numbers: the same at every evaluation and in every run."""
    rewards: list[RewardConfig] = field(default_factory=default_eval_rewards)
    """Scores to report; their weights are not used."""


@dataclass
class MonitorConfig:
    """What is watched to notice that a reward is being hacked; see docs/monitor.md."""

    rewards: list[RewardConfig] | None = None
    """Rewards that are not trained on, scored on a few images of every step; null = those of eval.rewards whose names are
    not among the rewards, [] = none."""
    images: int = bounded(8, "> 0")
    """How many images of a step these rewards score, evenly from its prompts."""
    kl: bool = True
    """Where the loss has no KL term, measure the KL divergence to the starting model on these images. Without either no second
    model is in memory."""


@dataclass
class LogConfig:
    """What is written besides metrics.jsonl."""

    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    """Trackers that receive the metrics: tensorboard, wandb, trackio."""
    project: str = "gcpo-t2i"
    """Project name at wandb and trackio."""
    images_every: int = bounded(10, ">= 0")
    """Draw a grid of samples beside their advantage maps every so many steps, for the run folder and trackers; 0 = never."""


def default_rewards() -> list[RewardConfig]:
    return [RewardConfig("geneval", kwargs={"score": "dense"})]


@dataclass
class TrainConfig:
    """The run."""

    model: str = "shapesworld"
    """What is trained: shapesworld (the model that ships with the package), a policy folder, a folder with a Janus of
    transformers, or a repository of the Hugging Face hub that holds one."""
    algorithm: str = "guidance_gcpo"
    """guidance_gcpo, gold_gcpo, critical_gcpo, stage, entropy_credit, grpo, dapo, gspo, or the control random_credit."""
    output_dir: str | None = None
    """Folder for metrics, images and the trained model; null = the first unused runs/ALGORITHM-N."""
    steps: int = bounded(60, "> 0")
    """Optimizer steps (rollouts, if updates_per_rollout is 1)."""
    seed: int = bounded(0, ">= 0")
    """Seed of everything random in training."""
    train_prompts: str = "shapesworld:train"
    """shapesworld:train, or a .txt file (a prompt per line), or a .jsonl file (GenEval's metadata format)."""
    train_mix: dict[str, int] | None = None
    """How often prompts of each tag come, as {tag: share, ...}, those of others never; null = equally."""
    prompts_per_step: int = bounded(8, "> 0")
    """Different prompts per step, over all processes."""
    group_size: int = bounded(8, "> 0")
    """Images per prompt, which are compared with each other."""
    guidance: float = bounded(2.0, ">= 0")
    """Scale of classifier-free guidance while sampling; 1 = none."""
    temperature: float = bounded(1.0, "> 0")
    """Sampling temperature."""
    top_k: int = bounded(0, ">= 0")
    """Sample among the k most likely codes; 0 = all."""
    top_p: float = bounded(1.0, "in (0, 1]")
    """Sample among the most likely codes that together hold this probability; 1 = all."""
    rollout_batch_size: int | None = bounded(None, "> 0")
    """Images of a process that are sampled at once, a multiple of group_size; null = all of a step. Fewer take less memory,
    and the images of one part are scored while the next part is sampled, which pays where a reward waits for others."""
    scoring: Literal["guided", "conditional"] = "guided"
    """Whose log-probability is trained: that of the guided mixture that sampled, or the model's under the prompt."""
    updates_per_rollout: int = bounded(1, "> 0")
    """Optimizer updates on each batch of images."""
    micro_batch_size: int | Literal["auto"] = bounded(16, "> 0")
    """Images per forward and backward pass; changes memory and speed, not the gradient. auto = the largest power of two for
    which there is memory at the start, at most 16 on a CPU; the run's config.yaml holds the number."""
    gradient_checkpointing: bool = False
    """Keep of each layer of the trunk only its input for the backward pass, and compute the rest again: much less memory,
    about a third more time per update, the same gradient."""
    eval_every: int = bounded(0, ">= 0")
    """Evaluate every so many steps; 0 = only before the first and after the last."""
    save_every: int = bounded(20, ">= 0")
    """Save a checkpoint to resume from every so many steps; 0 = only at the end."""
    keep_last: int | None = bounded(2, "> 0")
    """How many of the newest checkpoints are kept; null = all."""
    resume: bool = False
    """Go on with the run in output_dir, from its newest checkpoint and with its settings."""
    overwrite: bool = False
    """Delete what is in output_dir."""
    device: str | None = None
    """cpu, cuda or cuda:N; null = cuda if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the model's layers; auto = bfloat16 where the device multiplies it, else float32. Losses are always
    float32. Weights are kept in float32 where they are trained; with lora.rank they are kept in the precision of the layers."""
    rewards: list[RewardConfig] = field(default_factory=default_rewards)
    """A list of {name, weight, kwargs}: geneval, clip, aesthetic, pickscore, hps, remote, or your own as pkg.module:name or
    file.py:name; the factor in the sum; settings."""
    success_reward: float | None = None
    """An image is right if its weighted sum of rewards is at least this; null = if the rewards that can tell say so, such as
    geneval by its strict verdict. gold_gcpo goes by it."""
    credit: CreditConfig = field(default_factory=CreditConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def micro_batch(self) -> int:
        """`micro_batch_size` as the number that it is once a run has begun."""
        assert isinstance(self.micro_batch_size, int)
        return self.micro_batch_size

    def check(self) -> None:
        _check_train(self)
        check_resume(self.resume, self.overwrite, self.output_dir)


def resolve_algorithm(config: TrainConfig) -> tuple[Any, Any]:
    """The `algo.rows.Algorithm` with the parts that the config replaces, and the `algo.credit.CreditSettings`.

    Imports torch. The types are not written out, because jsonargparse would execute their imports for every --help.
    Raises ConfigError for unknown names, with the nearest one, and for parts that do not go together.
    """
    from gcpo_t2i.algo import advantage, credit, loss, rows

    names = {
        "algorithm": (config.algorithm, rows.ROWS),
        "credit.rule": (config.credit.rule, credit.CREDITS),
        "credit.contrast": (config.credit.contrast, credit.CONTRASTS),
        "credit.normalizer": (config.credit.normalizer, credit.NORMALIZERS),
        "loss.surrogate": (config.loss.surrogate, loss.SURROGATES),
        "loss.averaging": (config.loss.averaging, loss.AVERAGING),
        "loss.advantage_scale": (config.loss.advantage_scale, advantage.SCALES),
    }
    check_known(names)
    parts = ("surrogate", "averaging", "advantage_scale", "clip_low", "clip_high")
    replaced = {name: getattr(config.loss, name) for name in parts}
    weights = {name: value for name, value in vars(config.credit).items() if name not in ("rule", "source")}
    try:
        return rows.resolve(config.algorithm, credit=config.credit.rule, **replaced), credit.CreditSettings(**weights)
    except ValueError as error:
        raise ConfigError("credit", str(error)) from error


def check_known(names: Mapping[str, tuple[str | None, Collection[str]]]) -> None:
    """Key → a name or None, and the names that there are. ConfigError for the first that is none, with the nearest one."""
    for key, (value, known) in names.items():
        if value is not None and value not in known:
            raise ConfigError(key, f"{key} '{value}' is unknown{suggest(value, known)}")


def share_of_prompts(prompts_per_step: int, processes: int) -> int:
    """Prompts per step of each process. ConfigError if they cannot be split evenly."""
    if prompts_per_step % processes:
        raise ConfigError(
            "prompts_per_step",
            f"prompts_per_step {prompts_per_step} cannot be split evenly over {processes} processes; use a multiple",
        )
    return prompts_per_step // processes


def _check_train(config: TrainConfig) -> None:
    resolve_algorithm(config)
    if config.group_size == 1:
        raise ConfigError(
            "group_size",
            "group_size 1 leaves no group to compare an image with, and the advantage is normalised by group; "
            "use group_size 2 or more",
        )
    if config.rollout_batch_size is not None and config.rollout_batch_size % config.group_size:
        nearest = max(1, round(config.rollout_batch_size / config.group_size)) * config.group_size
        raise ConfigError(
            "rollout_batch_size",
            f"rollout_batch_size {config.rollout_batch_size} is no multiple of group_size {config.group_size}, and groups "
            f"are sampled whole; use {nearest}",
        )
    if config.loss.kl_reweight and config.loss.beta == 0:
        raise ConfigError("loss.kl_reweight", "loss.kl_reweight changes the KL term, which needs loss.beta > 0; set it")
    if config.lora.rank is not None and not config.lora.targets:
        raise ConfigError(
            "lora.targets", "lora.targets is empty, and adapters need a place; name a layer, such as q_proj"
        )
    if not all(0 <= beta < 1 for beta in config.optim.betas):
        raise ConfigError("optim.betas", f"optim.betas must be in [0, 1), not {list(config.optim.betas)}")
    for reward in config.rewards:
        if not math.isfinite(reward.weight):
            raise ConfigError("rewards", f"rewards: the weight of '{reward.name}' must be finite, not {reward.weight}")
    if not any(reward.weight for reward in config.rewards):
        raise ConfigError("rewards", "rewards: at least one reward with a weight other than 0 is needed")
    check_reward_names("rewards", config.rewards)
    check_reward_names("eval.rewards", config.eval.rewards)
    check_reward_names("monitor.rewards", config.monitor.rewards or [])


def reward_name(reward: RewardConfig) -> str:
    """Its name; `remote/NAME` for the reward of that name on a server."""
    return f"remote/{reward.kwargs.get('reward')}" if reward.name == "remote" else reward.name


def check_reward_names(key: str, rewards: list[RewardConfig]) -> None:
    """Raises ConfigError if a reward is there twice."""
    names = [reward_name(reward) for reward in rewards]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(key, f"{key}: '{name}' is there twice, and their scores would have one name")
