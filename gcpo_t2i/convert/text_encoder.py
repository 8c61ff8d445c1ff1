"""The T5 encoder and its tokenizer, as LlamaGen uses them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, T5EncoderModel

from gcpo_t2i.errors import UserError
from gcpo_t2i.models.folder import no_progress_bars, read_json, reading, require_complete
from gcpo_t2i.models.hub import local_folder, require_file

OPTION = "--text_encoder"


def find_text_encoder(name: str, width: int) -> Path:
    """The folder of a T5 model, by hub id or path. UserError when it is not there, no T5, or not of `width`."""
    folder = local_folder(name, OPTION)
    if not folder.is_dir():
        raise UserError(f"{OPTION}: no folder {name}, and repositories of the Hugging Face hub are named OWNER/NAME")
    for patterns in (("config.json",), ("model.safetensors", "*.safetensors"), ("tokenizer.json", "spiece.model")):
        require_file(folder, name, OPTION, *patterns)
    config = read_json(folder / "config.json")
    if config.get("model_type") != "t5":
        raise UserError(
            f"{OPTION}: {name} is a {config.get('model_type')!r} model, expected a T5, as google/flan-t5-xl"
        )
    if config.get("d_model") != width:
        raise UserError(f"{OPTION}: {name} has width {config.get('d_model')}, the checkpoint's captions have {width}")
    return folder


def load_text_encoder(folder: Path) -> tuple[T5EncoderModel, PreTrainedTokenizerFast]:
    """The encoder half in float32, and the tokenizer, made to lower case: LlamaGen's captions are.

    The rest of LlamaGen's cleaning (`language/t5.py`: links, file names, CJK, odd punctuation) is left out: of 3000 of its
    COCO captions, lower case alone makes 2984 what it makes of them, and nothing 387; of GenEval's 553 prompts all.
    """
    kind: Any = T5EncoderModel
    with reading(folder), no_progress_bars():
        encoder, info = kind.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
        require_complete(folder, info)
        loaded: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    core = loaded.backend_tokenizer
    steps = [normalizers.Lowercase(), *([core.normalizer] if core.normalizer else [])]
    core.normalizer = normalizers.Sequence(steps)
    tokens = {f"{kind}_token": getattr(loaded, f"{kind}_token") for kind in ("pad", "eos", "unk")}
    return encoder.eval(), PreTrainedTokenizerFast(tokenizer_object=core, **tokens)
