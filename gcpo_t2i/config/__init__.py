"""Every setting of every command, as typed dataclasses; the string under a field is its sentence in `--help`.

    config = TrainConfig(algorithm="grpo", steps=10)   # or gcpo_t2i.parsing.load_config("configs/shapesworld_grpo.yaml")
    validate(config)                                   # UserError that names the field, its value, and the cure

Flags and YAML keys are made out of these classes (`gcpo_t2i.parsing`): a new field is a new flag, and nothing else changes.
"""

from gcpo_t2i.config.base import ConfigError, bounded, suggest, validate
from gcpo_t2i.config.bench import BenchConfig
from gcpo_t2i.config.compare import CompareConfig
from gcpo_t2i.config.convert import ConvertLlamaGenConfig
from gcpo_t2i.config.cot import CotEvalConfig, CotHeatmapConfig, CotTrainConfig
from gcpo_t2i.config.credit_eval import CreditEvalConfig
from gcpo_t2i.config.demo import DemoConfig
from gcpo_t2i.config.env import EnvConfig
from gcpo_t2i.config.evaluation import EvaluationConfig
from gcpo_t2i.config.heatmap import HeatmapConfig
from gcpo_t2i.config.plan import PlanConfig
from gcpo_t2i.config.pretrain import PretrainConfig
from gcpo_t2i.config.probe import ProbeConfig
from gcpo_t2i.config.prompts_geneval import PromptsGenevalConfig
from gcpo_t2i.config.rewards_check import RewardsCheckConfig
from gcpo_t2i.config.rewards_serve import RewardsServeConfig
from gcpo_t2i.config.sample import SampleConfig
from gcpo_t2i.config.train import (
    CreditConfig,
    EvalConfig,
    LogConfig,
    LoraConfig,
    LossConfig,
    MonitorConfig,
    OptimConfig,
    RewardConfig,
    TrainConfig,
    resolve_algorithm,
    reward_name,
    share_of_prompts,
)

__all__ = [
    "BenchConfig",
    "CompareConfig",
    "ConfigError",
    "ConvertLlamaGenConfig",
    "CotEvalConfig",
    "CotHeatmapConfig",
    "CotTrainConfig",
    "CreditConfig",
    "CreditEvalConfig",
    "DemoConfig",
    "EnvConfig",
    "EvalConfig",
    "EvaluationConfig",
    "HeatmapConfig",
    "LogConfig",
    "LoraConfig",
    "LossConfig",
    "MonitorConfig",
    "OptimConfig",
    "PlanConfig",
    "PretrainConfig",
    "ProbeConfig",
    "PromptsGenevalConfig",
    "RewardConfig",
    "RewardsCheckConfig",
    "RewardsServeConfig",
    "SampleConfig",
    "TrainConfig",
    "bounded",
    "resolve_algorithm",
    "reward_name",
    "share_of_prompts",
    "suggest",
    "validate",
]
