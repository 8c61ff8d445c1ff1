"""Stage `reasoner`: a small Llama that answers in steps, from texts made up as it goes (`corpus`)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from gcpo_t2i.config import CotEvalConfig
from gcpo_t2i.cot.answers import answer_reward
from gcpo_t2i.cot.arithmetic.corpus import Example, draw_examples
from gcpo_t2i.cot.arithmetic.tokenizer import build_tokenizer
from gcpo_t2i.cot.evaluation import evaluate
from gcpo_t2i.cot.models import load_text_model
from gcpo_t2i.cot.negatives import QUESTION, WRONG_ON_PURPOSE
from gcpo_t2i.cot.questions import load_questions
from gcpo_t2i.shapes.pretrain.fit import Metrics, Schedule, autocast, fit

BATCH = 64
LONGEST = 48  # tokens of an answer that is measured
IGNORED = -100  # label of what no loss is taken of


def build_reasoner(tokenizer: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=384,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def tokens_of(tokenizer: Any, example: Example) -> tuple[list[int], list[int]]:
    """Ids of the conversation up to where the assistant speaks, and of what it says, with the end."""
    asked = [{"role": "user", "content": example.user}]
    text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    before = tokenizer(text, add_special_tokens=False)["input_ids"]
    return before, [*tokenizer(example.assistant, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def collate(tokenizer: Any, examples: list[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and labels, each (N, L), padded on the right; labels are of what the assistant says alone."""
    pairs = [tokens_of(tokenizer, example) for example in examples]
    longest = max(len(before) + len(said) for before, said in pairs)
    ids = torch.full((len(pairs), longest), tokenizer.pad_token_id)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, (before, said) in enumerate(pairs):
        end = len(before) + len(said)
        ids[row, :end], mask[row, :end] = torch.tensor(before + said), 1
        labels[row, len(before) : end] = torch.tensor(said)
    return ids, mask, labels


def train_reasoner(
    steps: int, folder: Path, seed: int, device: torch.device, dtype: torch.dtype
) -> tuple[LlamaForCausalLM, Metrics]:
    """A model that has learned from steps × BATCH texts, and its last metrics. Goes on from `folder`/reasoner.pt."""
    tokenizer: Any = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = build_reasoner(tokenizer)
    model.to(device)

    def loss_at(step: int) -> tuple[Tensor, Metrics]:
        ids, mask, labels = (
            part.to(device) for part in collate(tokenizer, list(draw_examples(500 + seed, step, BATCH)))
        )
        with autocast(device, dtype):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        return loss, {"loss": loss.item()}

    schedule = Schedule(steps, peak=2e-3, warmup=50, decay=0.5)
    metrics = fit("reasoner", model, loss_at, schedule, folder / "reasoner.pt")
    return model.eval(), metrics


def measure_reasoner(folder: Path, questions: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Accuracy on held-out questions of the model in `folder`: as asked, and where a wrong answer is asked for."""
    model, tokenizer = load_text_model(str(folder), device)
    held_out = load_questions("arithmetic:heldout", questions)
    scores: dict[str, dict[str, float]] = {}
    for column, template in {"question": QUESTION, "wrong on purpose": WRONG_ON_PURPOSE}.items():
        scores[column] = {}
        for row, temperature in {"temperature 1": 1.0, "likeliest tokens": 0.0}.items():
            how = CotEvalConfig(temperature=temperature)
            found = evaluate(model, tokenizer, held_out, answer_reward, how, template, LONGEST)
            scores[column] |= {row: found.mean, f"{row}_ci95": found.ci95}
    return scores


def save_reasoner(model: LlamaForCausalLM, folder: Path) -> None:
    """A folder that `AutoModelForCausalLM` and `AutoTokenizer` read. In float16, for the size; `load_text_model` makes
    float32 of it."""
    small: Any = copy.deepcopy(model)
    small.to(torch.float16).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
