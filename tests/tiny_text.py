"""A tiny language model of random weights, questions and rewards for tests of chain of thought."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gcpo_t2i.cot.arithmetic.tokenizer import build_tokenizer

QUESTIONS = ("Ann has two pens. She buys three more.", "Ben has nine cards. He sells one.", "Eva has four coins.")
ANSWER_LENGTH = 8


def tiny_text_model(seed: int = 0) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Logits are an order of magnitude larger than a fresh model's, so that prompts matter and ratios leave 1."""
    tokenizer = build_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                initializer_range=0.5,
                tie_word_embeddings=True,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.eos_token_id] *= 4  # so that some answers end early
    return model, tokenizer


def conversations(**columns: list[Any]) -> Dataset:
    """The questions as conversations, with more columns."""
    asked = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return Dataset.from_dict({"prompt": asked, **columns})


def even_ids(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that differs within a group: the share of tokens with an even id."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def settings(folder: Path, **others: Any) -> dict[str, Any]:
    """Of a run of two rollouts of 3 × 4 answers, SGD, every step logged."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 12,
        "num_generations": 4,
        "max_completion_length": ANSWER_LENGTH,
        "max_steps": 2,
        "learning_rate": 0.5,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 3,
        **others,
    }
