"""`gcpo-t2i convert llamagen`: published LlamaGen weights made into a policy folder that every command takes."""

from __future__ import annotations

from pathlib import Path

from gcpo_t2i.config import ConvertLlamaGenConfig
from gcpo_t2i.convert.checkpoints import read_state_dict
from gcpo_t2i.convert.gpt import convert_gpt, read_shape
from gcpo_t2i.convert.text_encoder import find_text_encoder, load_text_encoder
from gcpo_t2i.convert.vq import convert_vq
from gcpo_t2i.errors import UserError
from gcpo_t2i.files import whole_folder
from gcpo_t2i.folders import check_output_dir, check_replaceable
from gcpo_t2i.models.folder import INDEX
from gcpo_t2i.models.llamagen_parts import Parts, save_parts


def convert(config: ConvertLlamaGenConfig) -> Path:
    """Writes the policy folder, in float32 whatever the files are in, and returns it. UserError for what does not fit.

    What costs nothing is checked first; the folder gets its name when all of it is written.
    """
    gpt_file, vq_file, out = Path(str(config.gpt)), Path(str(config.vq)), _output(config)
    tensors = read_state_dict(gpt_file)
    shape = read_shape(gpt_file, tensors, config.size)
    vq = convert_vq(vq_file, read_state_dict(vq_file))
    if shape.codes != vq.config["num_vq_embeddings"]:
        raise UserError(
            f"{gpt_file} knows {shape.codes} codes, {vq_file} has {vq.config['num_vq_embeddings']}; take a pair"
        )
    text_folder = find_text_encoder(config.text_encoder, shape.text_dim)
    pixels, scale = config.pixels() or 0, 2 ** (len(vq.config["block_out_channels"]) - 1)
    side, rest = divmod(pixels, scale)
    if rest:
        raise UserError(f"image_size must be a multiple of {scale}, the pixels per code of {vq_file}, not {pixels}")
    trunk, adapter = convert_gpt(tensors, shape, positions=shape.caption_tokens + side**2)
    parts = Parts(trunk, adapter, *load_text_encoder(text_folder), vq)
    parts.check()
    print(
        f"size {shape.name}: {shape.size.layers} layers of width {shape.size.dim}; captions of {shape.caption_tokens}"
        f" tokens; images of {pixels} pixels, {side} × {side} of {shape.codes} codes"
    )
    with whole_folder(out) as folder:
        save_parts(parts, (side, side), folder, "LlamaGenPolicy")
    return out


def _output(config: ConvertLlamaGenConfig) -> Path:
    """The folder to write, if it may be: empty, or a policy that is to be overwritten and holds no source."""
    out = check_output_dir(str(config.out), overwrite=config.overwrite)
    if out.is_dir():
        check_replaceable(out, INDEX, "policy folder")
    sources = [Path(str(name)).resolve() for name in (config.gpt, config.vq, config.text_encoder)]
    inside = next((path for path in sources if out.resolve() in (path, *path.parents)), None)
    if inside is not None:
        raise UserError(f"{inside} is in the output folder '{out}', which is to be replaced; name another")
    return out
