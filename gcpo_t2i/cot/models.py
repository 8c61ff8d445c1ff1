"""Language models by name, and their answers to questions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gcpo_t2i.errors import UserError
from gcpo_t2i.models.hub import local_folder, require_file

EMBEDDED_MODEL = "arithmetic"
REASONER = Path(__file__).parent / "arithmetic" / "checkpoints" / "reasoner"


def load_text_model(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A causal language model of transformers, and its tokenizer. UserError for a folder that has none."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # over the tensors of a file
    folder = REASONER if name == EMBEDDED_MODEL else local_folder(name)
    if not folder.is_dir():
        raise UserError(f"--model: no folder '{name}'; {EMBEDDED_MODEL} is the model that ships with the package")
    require_file(folder, name, "--model", "config.json")
    require_file(folder, name, "--model", "*.safetensors")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--model: '{name}' cannot be loaded as a language model: {reason}") from error
    if tokenizer.chat_template is None:
        raise UserError(
            f"--model: '{name}' has no chat template; take an instruction-tuned model, or train with TRL itself"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return model.to(device), tokenizer


def prompt_ids(tokenizer: Any, users: Sequence[str]) -> list[list[int]]:
    """What the user says, through the chat template, up to where the assistant speaks."""
    talks = [[{"role": "user", "content": user}] for user in users]
    return tokenizer.apply_chat_template(talks, add_generation_prompt=True, tokenize=True, return_dict=True)[
        "input_ids"
    ]


def check_words(tokenizer: Any, text: str, name: str) -> None:
    """UserError for words that a tokenizer with a closed vocabulary does not know."""
    words = [word.strip(".,?:!;") for word in text.split()]
    ids = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    unknown = [word for word, own in zip(words, ids, strict=True) if tokenizer.unk_token_id in own]
    if tokenizer.unk_token_id is not None and unknown:
        listed = ", ".join(dict.fromkeys(unknown))
        raise UserError(f"the model '{name}' does not know: {listed}; ask as the questions of arithmetic:train do")


@torch.no_grad()
def answer(
    model: Any, tokenizer: Any, users: Sequence[str], *, tokens: int, temperature: float, seed: int, batch_size: int
) -> list[list[int]]:
    """One answer to each message, as ids with the end if it came. Temperature 0 takes the likeliest token each time."""
    ids = prompt_ids(tokenizer, users)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    how = sampling if temperature > 0 else {"do_sample": False}
    answers: list[list[int]] = []
    was_training = model.training
    model.eval()
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in range(0, len(ids), batch_size):
            batch = tokenizer.pad({"input_ids": ids[start : start + batch_size]}, return_tensors="pt").to(model.device)
            given = batch["input_ids"].shape[1]
            out = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=tokens,
                pad_token_id=tokenizer.pad_token_id,
                **how,
            )
            answers += [_until_end(row[given:].tolist(), tokenizer) for row in out]
    model.train(was_training)
    return answers


def _until_end(ids: list[int], tokenizer: Any) -> list[int]:
    return ids[: ids.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in ids else ids


@torch.no_grad()
def score_answers(
    model: Any, tokenizer: Any, user: str, answers: Sequence[Sequence[int]], temperature: float
) -> tuple[Tensor, Tensor]:
    """log π of the answers after one message, teacher-forced, and entropies: both (B,T) float32, nats; 0 behind an answer."""
    before = prompt_ids(tokenizer, [user])[0]
    longest = max(map(len, answers))
    padded = torch.full((len(answers), longest), tokenizer.pad_token_id)
    mask = torch.zeros_like(padded, dtype=torch.bool)
    for row, ids in enumerate(answers):
        padded[row, : len(ids)], mask[row, : len(ids)] = torch.tensor(ids), True
    # Padding stands behind the answer, which a causal model does not see.
    full = torch.cat([torch.tensor(before).expand(len(answers), -1), padded], dim=1).to(model.device)
    logits = model(full).logits[:, len(before) - 1 : -1].float() / temperature  # (B,T,V)
    logp = logits.log_softmax(dim=-1)
    chosen = logp.gather(-1, full[:, len(before) :, None])[..., 0].cpu()
    entropy = -(logp.exp() * logp).sum(dim=-1).cpu()
    return torch.where(mask, chosen, 0.0), torch.where(mask, entropy, 0.0)
