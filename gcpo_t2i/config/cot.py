"""Settings of `gcpo-t2i cot train` and `gcpo-t2i cot heatmap`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from gcpo_t2i.config.base import ConfigError, bounded, check_resume, or_empty
from gcpo_t2i.cot.negatives import WRONG_ON_PURPOSE, check_template
from gcpo_t2i.errors import UserError


@dataclass
class TextCreditConfig:
    """Which tokens of an answer get how much of its advantage."""

    rule: str | None = None
    """uniform, guidance, random (guidance weights in shuffled places) or entropy; null = what the algorithm uses."""
    contrast: str = "k3"
    """How the predictions after the prompt and after the negative prompt are compared: k3, abs or log_ratio."""
    normalizer: str = "power_rank"
    """How contrasts become weights with mean 1: power_rank, mean, softmax or none."""
    top: float = bounded(0.4, "in (0, 1)")
    """power_rank: this share of an answer's tokens ..."""
    mass: float = bounded(0.8, "in (0, 1)")
    """power_rank: ... holds this share of its credit."""
    temperature: float = bounded(1.0, "> 0")
    """softmax: temperature, in nats; higher is more uniform."""

    def resolved(self, default: str) -> Any:
        """The `cot.text_credit.TextCredit`; imports torch. ConfigError for unknown names and what does not go together."""
        from gcpo_t2i.cot.text_credit import TextCredit

        try:
            rule = self.rule or default
            return TextCredit.of(rule, self.contrast, self.normalizer, self.top, self.mass, self.temperature)
        except UserError as error:
            raise ConfigError("credit.rule", str(error)) from error


@dataclass
class CotEvalConfig:
    """Evaluation on held-out questions, before the first step and at the end."""

    data: str = "arithmetic:heldout"
    """Where the questions come from; see train_data."""
    num_questions: int = bounded(400, ">= 0")
    """How many questions are asked, from the first; 0 = no evaluation."""
    answers_per_question: int = bounded(1, "> 0")
    """How often each is asked; accuracy is the share of right answers."""
    temperature: float = bounded(1.0, ">= 0")
    """Temperature of the answers; 0 = the likeliest token each time."""
    batch_size: int = bounded(200, "> 0")
    """Answers sampled at a time."""
    seed: int = bounded(4321, ">= 0")
    """Seed of the evaluation's own random numbers."""


@dataclass
class CotTrainConfig:
    """One training run of a language model."""

    algorithm: str = "guidance_gcpo"
    """guidance_gcpo (2605.29198), grpo, dapo, gspo, gold_gcpo (2510.07790), entropy_credit, or random_credit (the control)."""
    model: str = "arithmetic"
    """arithmetic (the model that ships with the package), a folder of transformers, or a repository of the Hugging Face hub."""
    train_data: str = "arithmetic:train"
    """Questions: arithmetic:train, arithmetic:heldout, a .jsonl file with question and answer (and gold, optionally), or
    hf:NAME[:SPLIT] with such columns."""
    output_dir: str | None = None
    """Run folder; null = the next free runs/cot_ALGORITHM-N."""
    seed: int = bounded(0, ">= 0")
    """Seed of everything random."""
    steps: int = bounded(60, "> 0")
    """Number of optimizer steps."""
    questions_per_step: int = bounded(16, "> 0")
    """Different questions in every step."""
    group_size: int = bounded(8, "> 0")
    """Answers to each question, whose rewards are compared with each other; at least 2."""
    micro_batch_size: int | None = bounded(None, "> 0")
    """Answers per forward and backward pass; null = all of a step. Must divide questions_per_step x group_size."""
    updates_per_rollout: int = bounded(1, "> 0")
    """Optimizer steps with the same answers."""
    learning_rate: float = bounded(4e-4, "> 0")
    """Peak learning rate of AdamW, after a linear warm-up of a twentieth of the steps; it falls linearly to 0."""
    beta: float = bounded(0.0, ">= 0")
    """Factor of the KL divergence to the starting model; 0 = none, and no second model in memory."""
    max_answer_tokens: int = bounded(48, "> 0")
    """An answer is cut off here."""
    temperature: float = bounded(1.0, "> 0")
    """Sampling temperature."""
    prompt_template: str = "{question}"
    """What the user's message says, with the question in the place of {question}."""
    negative_template: str = or_empty(WRONG_ON_PURPOSE)
    """What it says in the negative prompt; '' = the empty prompt."""
    negative_column: str | None = None
    """Column of the data with negative prompts, in place of the template."""
    reward: str = "answer"
    """answer (1 if the number after 'answer:', in \\boxed{} or after #### is that of the data, else 0), or your own as
    path/to/file.py:name, a reward function of TRL."""
    success_reward: float = 1.0
    """gold_gcpo: an answer with at least this reward is right."""
    credit: TextCreditConfig = field(default_factory=TextCreditConfig)
    eval: CotEvalConfig = field(default_factory=CotEvalConfig)
    trl: dict[str, Any] = field(default_factory=dict)
    """More settings of TRL's GRPOConfig, for instance {use_vllm: true}; they win over those above."""
    save_every: int = bounded(0, ">= 0")
    """Checkpoint every this many steps, to go on from with --resume; 0 = none."""
    device: str | None = None
    """cpu or cuda; null = cuda if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the layers; auto = bfloat16 on a GPU, else float32."""
    resume: bool = False
    """Go on from the newest checkpoint in output_dir."""
    overwrite: bool = False
    """Delete the run in output_dir and start again."""

    def check(self) -> None:
        check_resume(self.resume, self.overwrite, self.output_dir)
        if self.group_size < 2:
            raise ConfigError(
                "group_size",
                f"group_size must be at least 2, not {self.group_size}: answers are compared with each other",
            )
        answers = self.questions_per_step * self.group_size
        if answers % (self.micro_batch_size or answers):
            raise ConfigError(
                "micro_batch_size",
                f"micro_batch_size {self.micro_batch_size} does not divide the {answers} answers of a step "
                f"({self.questions_per_step} questions x {self.group_size})",
            )
        if "{question}" not in self.prompt_template:
            raise ConfigError(
                "prompt_template", f"prompt_template '{self.prompt_template}' has no {{question}}; put it in"
            )
        check_negative(self.negative_template)
        self.settings()

    def settings(self) -> Any:
        """What the algorithm asks of TRL, `cot.algorithms.TextAlgorithm`; imports torch. ConfigError for one that is for
        images, and for credit that cannot be."""
        from gcpo_t2i.cot.algorithms import text_algorithm

        try:
            algorithm = text_algorithm(self.algorithm)
        except UserError as error:
            raise ConfigError("algorithm", str(error)) from error
        self.credit.resolved(algorithm.credit)
        return algorithm


def check_negative(template: str) -> None:
    try:
        check_template(template)
    except UserError as error:
        raise ConfigError("negative_template", str(error)) from error


DEFAULT_QUESTION = (
    "Ann has nine marbles. She finds five more. Then she doubles them. Then she gives away three. "
    "How many marbles does Ann have?"
)


@dataclass
class CotHeatmapConfig:
    """Token credit of one question's answers."""

    prompt: str = DEFAULT_QUESTION
    """The question."""
    answer: str | None = None
    """The right answer, a number: answers are then scored, and credit x advantage is drawn, too."""
    text: str | None = None
    """Explain this answer instead of sampling some."""
    model: str = "arithmetic"
    """arithmetic (the model that ships with the package), a folder of transformers (a run's policy/), or a repository."""
    prompt_template: str = "{question}"
    """What the user's message says, with the question in the place of {question}."""
    negative_template: str = or_empty(WRONG_ON_PURPOSE)
    """What it says in the negative prompt; '' = the empty prompt."""
    num_answers: int = bounded(4, "> 0")
    """Size of the group of answers."""
    max_answer_tokens: int = bounded(48, "> 0")
    """An answer is cut off here."""
    temperature: float = bounded(1.0, "> 0")
    """Sampling temperature."""
    seed: int = bounded(0, ">= 0")
    """Same seed, same answers."""
    credit: TextCreditConfig = field(default_factory=TextCreditConfig)
    out: str = "cot-heatmap.html"
    """The HTML file; the terminal shows the same."""
    overwrite: bool = False
    """Replace the file if it is there."""
    device: str | None = None
    """cpu, cuda or cuda:N; null = cuda if there is one."""

    def check(self) -> None:
        check_negative(self.negative_template)
        if "{question}" not in self.prompt_template:
            raise ConfigError(
                "prompt_template", f"prompt_template '{self.prompt_template}' has no {{question}}; put it in"
            )
        if not self.prompt.strip():
            raise ConfigError("prompt", "the prompt is empty; write a question")
        self.credit.resolved("guidance")
