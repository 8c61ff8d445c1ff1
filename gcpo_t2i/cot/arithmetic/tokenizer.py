"""A tokenizer with one token for each word, number and sign of the arithmetic world, and a chat template."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gcpo_t2i.cot.arithmetic.problems import NAMES, OPERATIONS, THINGS, in_words
from gcpo_t2i.cot.negatives import WRONG_ON_PURPOSE

PAD, END, USER, ASSISTANT, UNKNOWN = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|unknown|>"
SPACE = "▁"  # stands for the blank before a word, so that decoding gives back the text

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def vocabulary() -> list[str]:
    """All tokens, in the order of their ids."""
    told = " ".join(way for operation in OPERATIONS.values() for way in operation.told).replace("{k}", "")
    signs = " ".join(operation.word for operation in OPERATIONS.values())
    other = f"has is answer Then How many does have She He she he {' '.join(NAMES)} {' '.join(THINGS)}"
    on_purpose = WRONG_ON_PURPOSE.replace("{question}", "").replace(".", "")
    words = dict.fromkeys(f"{told} {signs} {other} {on_purpose}".split())
    numbers = [*map(in_words, range(100)), *map(str, range(100))]
    return [PAD, END, USER, ASSISTANT, UNKNOWN, *".,?:", *(SPACE + word for word in (*words, *numbers))]


def build_tokenizer() -> PreTrainedTokenizerFast:
    ids = {token: place for place, token in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(SPACE, prepend_scheme="always"),
            pre_tokenizers.Split(Regex(r"[.,?:]"), behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(SPACE, prepend_scheme="always")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT],
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )
