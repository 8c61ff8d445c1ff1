"""`gcpo-t2i cot train`: a language model, questions, and GuidanceGRPOTrainer, set up by one config."""

from __future__ import annotations

import dataclasses
import importlib
import os
import shlex
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from transformers import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from gcpo_t2i.config import CotTrainConfig
from gcpo_t2i.cot.answers import answer_reward
from gcpo_t2i.cot.evaluation import Evaluation, RewardFn, evaluate, user_message
from gcpo_t2i.cot.gold import missing_gold
from gcpo_t2i.cot.models import load_text_model
from gcpo_t2i.cot.questions import Question, load_questions
from gcpo_t2i.cot.run import CONFIG, Progressing, clear, opened_folder, to_resume, write_card, write_evaluation
from gcpo_t2i.cot.versions import check_trl
from gcpo_t2i.errors import UserError, did_you_mean
from gcpo_t2i.run import resolve_device
from gcpo_t2i.yaml_files import save_config

WARMUP = 20  # the learning rate rises over one in so many steps


@dataclass
class Job:
    """What a run is made of. `found`: its evaluations so far."""

    config: CotTrainConfig
    model: Any
    tokenizer: Any
    questions: list[Question]
    held_out: list[Question]
    reward: RewardFn
    console: Console
    found: list[Evaluation] = field(default_factory=list)


def train(config: CotTrainConfig) -> Path:
    """Runs the training that `config` describes and returns the run folder. UserError for what the user can mend."""
    check_trl()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of names that TRL still uses
        return start(prepare(config))


def start(job: Job) -> Path:
    """Opens the run's folder and runs; the first process alone writes there, and evaluates."""
    config = job.config
    if os.environ.get("RANK", "0") != "0":
        folder = Path(config.output_dir or "runs")
        checkpoint = get_last_checkpoint(str(folder)) if config.resume else None
        return run(job, trl_arguments(job, folder), folder, checkpoint)
    with opened_folder(config) as folder:
        arguments = trl_arguments(job, folder)  # if they are refused, a run that is there stays as it is
        if config.overwrite:
            clear(folder)
        checkpoint, notes = to_resume(folder, config) if config.resume else (None, [])
        for note in notes:
            job.console.print(f"[yellow]{note}[/]")
        config.output_dir = str(folder)
        save_config(config, folder / CONFIG)
        return run(job, arguments, folder, checkpoint)


def prepare(config: CotTrainConfig) -> Job:
    """Data, reward and model. UserError for what is not there or not usable; nothing is written."""
    reward = load_reward(config.reward)
    numbers = reward is answer_reward
    questions = load_questions(config.train_data, numbers=numbers, negatives=config.negative_column)
    check_gold(config, questions)
    check_kinds(questions, config.train_data)
    main = os.environ.get("RANK", "0") == "0"
    asked = config.eval.num_questions if main else 0
    held_out = load_questions(config.eval.data, asked, numbers) if asked else []
    model, tokenizer = load_text_model(config.model, resolve_device(config.device))
    return Job(config, model, tokenizer, questions, held_out, reward, Console(highlight=False, quiet=not main))


def run(job: Job, arguments: Any, folder: Path, checkpoint: str | None) -> Path:
    """Evaluates, trains, saves, evaluates."""
    config, console = job.config, job.console
    trainer = make_trainer(job, arguments)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progressing(folder, config, console))
    console.print(
        f"[bold]{config.algorithm}[/] on {config.model}: {config.steps} steps of {config.questions_per_step} questions × "
        f"{config.group_size} answers, {trainer.args.device}, results in {folder}"
    )
    if checkpoint is None:
        measure(job, trainer, folder, 0)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        if config.save_every:
            console.print(f"go on with: gcpo-t2i cot train --output_dir {shlex.quote(str(folder))} --resume")
        raise
    trainer.save_model(str(folder / "policy"))
    measure(job, trainer, folder, config.steps)
    if not trainer.accelerator.is_main_process:
        return folder
    (folder / "policy" / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
    label = reward_label(config.reward)
    if len(job.found) == 2:
        before, after = (one.mean for one in job.found)
        console.print(f"held-out {label}: {before:.3f} → [bold]{after:.3f}[/] ({after - before:+.3f})")
    console.print(f"\nLook next:\n  gcpo-t2i cot heatmap --model {folder / 'policy'}")
    write_card(folder, config, label, job.found)
    return folder


def measure(job: Job, trainer: Any, folder: Path, step: int) -> None:
    """One evaluation, if there are held-out questions."""
    if not job.held_out:
        return
    config, label = job.config, reward_label(job.config.reward)
    policy = trainer.accelerator.unwrap_model(trainer.model)
    how = job.reward, config.eval, config.prompt_template, config.max_answer_tokens
    evaluation = evaluate(policy, job.tokenizer, job.held_out, *how)
    write_evaluation(folder, step, evaluation, label)
    job.found.append(evaluation)
    job.console.print(f"held-out {label} after step {step}: [bold]{evaluation.mean:.3f}[/] ± {evaluation.ci95:.3f}")


def trl_arguments(job: Job, folder: Path) -> Any:
    """The GuidanceGRPOConfig of a run. UserError for settings in `trl` that TRL does not have, or that do not go together."""
    from gcpo_t2i.cot import GuidanceGRPOConfig

    config = job.config
    known = [item.name for item in dataclasses.fields(GuidanceGRPOConfig) if item.init]
    for name in config.trl:
        if name not in known:
            raise UserError(f"trl: GRPOConfig has no '{name}'{did_you_mean(name, known)}")
    with refusals():
        arguments: Any = GuidanceGRPOConfig(**trl_settings(config, folder))
    check_enough(job.questions, arguments.generation_batch_size // config.group_size, config.train_data)
    return arguments


def make_trainer(job: Job, arguments: Any) -> Any:
    """The trainer of a run. UserError for what TRL refuses."""
    from datasets import Dataset

    from gcpo_t2i.cot import GuidanceGRPOTrainer

    rows = [
        {**question, "prompt": [{"role": "user", "content": user_message(job.config.prompt_template, question)}]}
        for question in job.questions
    ]
    with refusals():
        return GuidanceGRPOTrainer(
            job.model, job.reward, arguments, Dataset.from_list(rows), processing_class=job.tokenizer
        )


@contextmanager
def refusals() -> Iterator[None]:
    """Errors of TRL about its settings, and about packages that they need, as UserErrors of one line."""
    try:
        yield
    except (ValueError, ImportError) as error:
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


def check_kinds(questions: Sequence[Question], source: str) -> None:
    """UserError for a column that is a text here and a number there: TRL's data sets have one kind in each."""
    from datasets import Dataset

    for name in questions[0]:
        try:
            Dataset.from_dict({name: [question[name] for question in questions]})
        except (TypeError, ValueError) as error:  # pyarrow's are both
            raise UserError(
                f"column '{name}' of '{source}' has values of different kinds ({error}); make them all texts, or all numbers, "
                "or all lists"
            ) from error


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
