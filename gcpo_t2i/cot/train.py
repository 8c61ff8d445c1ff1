"""`gcpo-t2i cot train`: a language model, questions, and GuidanceGRPOTrainer, set up by one config."""

from __future__ import annotations

import dataclasses
import importlib
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from gcpo_t2i.config import CotTrainConfig
from gcpo_t2i.cot.answers import answer_reward
from gcpo_t2i.cot.evaluation import RewardFn, evaluate, user_message
from gcpo_t2i.cot.gold import missing_gold
from gcpo_t2i.cot.models import load_text_model
from gcpo_t2i.cot.questions import Question, load_questions
from gcpo_t2i.cot.run import Progressing, clear, newest_checkpoint, run_folder, write_evaluation
from gcpo_t2i.cot.versions import check_trl
from gcpo_t2i.errors import UserError, did_you_mean
from gcpo_t2i.folders import locked
from gcpo_t2i.run import resolve_device
from gcpo_t2i.yaml_files import save_config

WARMUP = 20  # the learning rate rises over one in so many steps


def train(config: CotTrainConfig) -> Path:
    """Runs the training that `config` describes and returns the run folder. UserError for what the user can mend."""
    check_trl()
    reward = load_reward(config.reward)
    questions = load_questions(config.train_data, numbers=reward is answer_reward)
    held_out: list[Question] = []
    if config.eval.num_questions:
        held_out = load_questions(config.eval.data, config.eval.num_questions, numbers=reward is answer_reward)
    check_gold(config, questions)
    device = resolve_device(config.device)
    model, tokenizer = load_text_model(config.model, device)
    main = os.environ.get("RANK", "0") == "0"
    console = Console(highlight=False, quiet=not main)
    folder = run_folder(config)
    if not main:
        return _run(config, folder, (model, tokenizer), questions, [], reward, console)
    with locked(folder):
        if config.overwrite:
            clear(folder)
        config.output_dir = str(folder)
        save_config(config, folder / "config.yaml")
        return _run(config, folder, (model, tokenizer), questions, held_out, reward, console)


def _run(
    config: CotTrainConfig,
    folder: Path,
    loaded: tuple[Any, Any],
    questions: Sequence[Question],
    held_out: Sequence[Question],
    reward: RewardFn,
    console: Console,
) -> Path:
    from transformers import PrinterCallback

    model, tokenizer = loaded
    checkpoint = newest_checkpoint(folder) if config.resume else None
    trainer = make_trainer(config, folder, model, tokenizer, questions, reward)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progressing(folder, config.questions_per_step * config.group_size, console))
    console.print(
        f"[bold]{config.algorithm}[/] on {config.model}: {config.steps} steps of {config.questions_per_step} questions × "
        f"{config.group_size} answers, {trainer.args.device}, results in {folder}"
    )
    label, found = reward_label(config.reward), []

    def measure(step: int) -> None:
        if not held_out:
            return
        policy = trainer.accelerator.unwrap_model(trainer.model)
        how = reward, config.eval, config.prompt_template, config.max_answer_tokens
        evaluation = evaluate(policy, tokenizer, held_out, *how)
        write_evaluation(folder, step, evaluation, label)
        found.append(evaluation.mean)
        console.print(f"held-out {label} after step {step}: [bold]{evaluation.mean:.3f}[/] ± {evaluation.ci95:.3f}")

    if checkpoint is None:
        measure(0)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        if config.save_every:
            console.print(f"go on with: gcpo-t2i cot train --output_dir {shlex.quote(str(folder))} --resume")
        raise
    trainer.save_model(str(folder / "policy"))
    (folder / "policy" / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
    measure(config.steps)
    if len(found) == 2:
        console.print(f"held-out {label}: {found[0]:.3f} → [bold]{found[1]:.3f}[/] ({found[1] - found[0]:+.3f})")
    console.print(f"\nLook next:\n  gcpo-t2i cot heatmap --model {folder / 'policy'}")
    return folder


def make_trainer(
    config: CotTrainConfig, folder: Path, model: Any, tokenizer: Any, questions: Sequence[Question], reward: RewardFn
) -> Any:
    """The trainer of a run. UserError for settings in `trl` that TRL does not have, or that do not go together."""
    from datasets import Dataset

    from gcpo_t2i.cot import GuidanceGRPOConfig, GuidanceGRPOTrainer

    known = [item.name for item in dataclasses.fields(GuidanceGRPOConfig) if item.init]
    for name in config.trl:
        if name not in known:
            raise UserError(f"trl: GRPOConfig has no '{name}'{did_you_mean(name, known)}")
    rows = [
        {**question, "prompt": [{"role": "user", "content": user_message(config.prompt_template, question)}]}
        for question in questions
    ]
    try:
        args: Any = GuidanceGRPOConfig(**trl_settings(config, folder))
        check_enough(questions, args.generation_batch_size // config.group_size, config.train_data)
        return GuidanceGRPOTrainer(model, reward, args, Dataset.from_list(rows), processing_class=tokenizer)
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from error


def check_enough(questions: Sequence[Question], wanted: int, source: str) -> None:
    """UserError for fewer questions than one rollout asks: TRL leaves incomplete ones out, and would train on nothing."""
    if len(questions) < wanted:
        raise UserError(
            f"'{source}' has {len(questions)} questions, and every rollout asks {wanted} different ones; "
            f"give more, or lower --questions_per_step"
        )


def trl_settings(config: CotTrainConfig, folder: Path) -> dict[str, Any]:
    """Arguments of GuidanceGRPOConfig. The answers of a step are shared out over processes and micro-batches."""
    algorithm, device = config.settings(), resolve_device(config.device)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    answers = config.questions_per_step * config.group_size
    if answers % processes:
        raise UserError(f"the {answers} answers of a step cannot be shared out evenly over {processes} processes")
    micro = config.micro_batch_size or answers // processes
    if (answers // processes) % micro:
        raise UserError(f"micro_batch_size {micro} does not divide the {answers // processes} answers of each process")
    credit = config.credit
    ours = {
        "output_dir": str(folder),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": answers // processes // micro,
        "num_generations": config.group_size,
        "max_completion_length": config.max_answer_tokens,
        "temperature": config.temperature,
        "num_iterations": config.updates_per_rollout,
        "max_steps": config.steps,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": max(1, config.steps // WARMUP),
        "beta": config.beta,
        "seed": config.seed,
        "logging_steps": 1,
        "save_strategy": "steps" if config.save_every else "no",
        "save_steps": config.save_every or 500,
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "use_cpu": device.type == "cpu",
        "bf16": config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda"),
        "credit": credit.rule or algorithm.credit,
        "credit_contrast": credit.contrast,
        "credit_normalizer": credit.normalizer,
        "credit_top": credit.top,
        "credit_mass": credit.mass,
        "credit_temperature": credit.temperature,
        "negative_template": config.negative_template,
        "negative_column": config.negative_column,
        "gold_column": "gold" if algorithm.gold else None,
        "success_reward": config.success_reward,
    }
    return ours | algorithm.trl | config.trl


def check_gold(config: CotTrainConfig, questions: Sequence[Question]) -> None:
    """UserError where an algorithm wants references and the data have none."""
    if config.settings().gold and missing_gold([question.get("gold") for question in questions]) == len(questions):
        raise UserError(
            f"algorithm '{config.algorithm}' puts references in the place of failed answers, and no question of "
            f"'{config.train_data}' has one; add a column 'gold' with right answers, written out"
        )


def load_reward(name: str) -> RewardFn:
    """`answer`, or a function by name. UserError or RewardError if there is none."""
    if name == "answer":
        return answer_reward
    from gcpo_t2i.scoring import rewards_package

    rewards_package()
    reward: Any = importlib.import_module("rewards.loading").load_object(name)
    if not callable(reward):
        raise UserError(f"reward '{name}' is no function; give one that takes completions and returns a score for each")
    return cast(RewardFn, reward)


def reward_label(name: str) -> str:
    return "accuracy" if name == "answer" else name.rpartition(":")[2]
