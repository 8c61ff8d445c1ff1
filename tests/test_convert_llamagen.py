"""Published LlamaGen weights → policy: the numbers of the published modules, every tensor's place, and bad files."""

from __future__ import annotations

import argparse
import copy
import functools
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest
import torch
from huggingface_hub import errors
from torch import Tensor
from transformers import CLIPTextConfig, T5Config, T5EncoderModel, T5Tokenizer

from gcpo_t2i.cli import main
from gcpo_t2i.config import ConvertLlamaGenConfig
from gcpo_t2i.convert.gpt import SIZES, Size, convert_gpt, half_split, read_shape
from gcpo_t2i.convert.text_encoder import find_text_encoder
from gcpo_t2i.convert.vq import convert_vq
from gcpo_t2i.models import load_policy, vq
from gcpo_t2i.models.hub import local_folder
from gcpo_t2i.models.llamagen import LlamaGenPolicy
from gcpo_t2i.models.policy import Condition
from gcpo_t2i.models.sizes import read_sizes
from tests import llamagen_reference as reference

PATH = Path("weights.pt")
WORDS = ["a", "photo", "of", "red", "circle"]


@pytest.fixture(autouse=True)
def tiny_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "tiny", Size(layers=3, dim=64, heads=reference.HEADS))


@functools.cache
def published(kind: str) -> dict[str, Tensor]:
    return reference.tensors(kind)


def write_text_encoder(folder: Path, width: int = 32) -> Path:
    """A T5 of random weights in the format of google/flan-t5-xl."""
    torch.manual_seed(0)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -9.0), *((f"▁{word}", -1.0) for word in WORDS)]
    T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(folder)
    config = T5Config(
        vocab_size=len(pieces),
        d_model=width,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    T5EncoderModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """gpt_64.pt as DDP training saves it, vq.pt, t5/, and policy/ made of them."""
    folder = tmp_path_factory.mktemp("llamagen")
    options = argparse.Namespace(gpt_model="GPT-XL", lr=1e-4)
    torch.save({"model": published("gpt"), "optimizer": {}, "steps": 7, "args": options}, folder / "gpt.pt")
    torch.save({"model": published("vq")}, folder / "vq.pt")
    write_text_encoder(folder / "t5")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "tiny", Size(layers=3, dim=64, heads=reference.HEADS))
        assert main(command(folder, folder / "policy")) == 0
    return folder


def command(files: Path, out: Path, **options: object) -> list[str]:
    """The command line, 4 × 4 codes of 64 pixels."""
    paths = {"gpt": files / "gpt.pt", "vq": files / "vq.pt", "text_encoder": files / "t5", "out": out, "image_size": 64}
    flags = [word for name, value in {**paths, **options}.items() for word in (f"--{name}", str(value))]
    return ["convert", "llamagen", *flags]


@pytest.fixture(scope="module")
def policy(files: Path) -> LlamaGenPolicy:
    loaded = load_policy(files / "policy")
    assert isinstance(loaded, LlamaGenPolicy)
    return loaded


def conditions(policy: LlamaGenPolicy) -> tuple[Condition, Condition]:
    """The reference's captions, and null captions under their masks."""
    cond = Condition(*reference.captions())
    return cond, policy.drop_captions(cond, torch.ones(3, dtype=torch.bool))


# ---- the numbers of the published modules


def test_logits_are_those_of_the_published_module(policy: LlamaGenPolicy) -> None:
    golden = reference.golden()
    with torch.no_grad():
        for name, given in zip(("cond_logits", "null_logits"), conditions(policy), strict=True):
            logits = policy(given.states, given.mask, reference.codes())[..., ::8]
            error = (logits - golden[name]).abs().max() / golden[name].abs().max()
            assert error < 1e-4, f"{name}: {error:.1e}"
    assert (golden["cond_logits"] - golden["null_logits"]).abs().mean() > 0.1  # the caption is looked at


def test_what_the_published_conventions_are_worth(policy: LlamaGenPolicy) -> None:
    """Caption positions turned by the identity, or codes by interleaved pairs, are seen in the logits."""
    golden, (cond, _) = reference.golden()["cond_logits"], conditions(policy)

    @torch.no_grad()
    def error(changed: LlamaGenPolicy) -> float:
        logits = changed(cond.states, cond.mask, reference.codes())[..., ::8]
        return float((logits - golden).abs().max() / golden.abs().max())

    turned, interleaved = copy.deepcopy(policy), copy.deepcopy(policy)
    turned.trunk.rotary_emb.cos[:120] = 1  # pyright: ignore[reportIndexIssue]
    trunk: Any = interleaved.trunk
    trunk.layers[0].self_attn.q_proj.weight.data = published("gpt")["layers.0.attention.wqkv.weight"][:64]
    assert error(policy) < 1e-4 and error(turned) > 0.05 and error(interleaved) > 0.05


def test_greedy_guided_codes_are_those_of_the_published_sampler(policy: LlamaGenPolicy) -> None:
    cond, null = conditions(policy)
    rollout = policy.sample(cond, null, group=1, guidance=7.5, top_k=1)
    assert torch.equal(rollout.tokens, reference.golden()["greedy"].long())


def test_codes_and_pixels_are_those_of_the_published_tokenizer() -> None:
    golden, model = reference.golden(), convert_vq(PATH, published("vq"))
    codes = vq.encode_images(model, reference.images(), (16, 16))
    assert (codes == golden["image_codes"]).float().mean() >= 0.999
    assert golden["image_codes"].unique().numel() > 200
    pixels = vq.decode_pixels(model, golden["image_codes"][:2].long(), (16, 16))[:, :, ::7, ::7]
    assert (pixels - golden["pixels"]).abs().max() < 1e-3


def test_rows_are_permuted_within_heads() -> None:
    # two heads of 4 channels: pairs (0, 1) and (2, 3) become (0, 2) and (1, 3)
    rows = torch.arange(8.0)[:, None]
    assert half_split(rows, heads=2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


# ---- every tensor has a place


@pytest.mark.parametrize("size", ["B", "L", "XL", "XXL", "3B"])
def test_every_tensor_of_a_full_size_has_a_place(size: str) -> None:
    shapes = reference.layout("gpt", size)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    shape = read_shape(PATH, {**tensors, "freqs_cis": torch.empty(376, 32, 2, device="meta")}, size)
    assert shape == read_shape(PATH, tensors, None) and shape.name == size
    trunk, adapter = convert_gpt(tensors, shape, positions=120 + 256)
    placed = [p for module in (trunk, adapter) for p in module.parameters()]
    assert sum(p.numel() for p in placed) == sum(t.numel() for t in tensors.values())
    assert all(p.device.type == "meta" and p.dtype == torch.float32 for p in placed)


def test_every_tensor_of_the_full_tokenizer_has_a_place() -> None:
    tensors = {name: torch.empty(shape, device="meta") for name, shape in reference.layout("vq", "16").items()}
    model = convert_vq(PATH, tensors)
    used = [tensor for name, tensor in tensors.items() if name != "quantize.codebook_used"]
    assert len(used) == len(model.state_dict()) == len(tensors) - 1
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in used)
    assert model.config["num_vq_embeddings"] == 16384 and model.config["block_out_channels"] == (
        128,
        128,
        256,
        256,
        512,
    )


def test_the_option_names_the_known_sizes() -> None:
    literal = next(part for part in get_args(get_type_hints(ConvertLlamaGenConfig)["size"]) if get_args(part))
    assert set(get_args(literal)) == SIZES.keys() - {"tiny"}


# ---- the command


@pytest.mark.parametrize("key", ["model", "module", "state_dict", None])
def test_key_layouts(files: Path, tmp_path: Path, key: str | None) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in published("gpt").items()}
    torch.save({key: tensors} if key else tensors, tmp_path / "gpt_256.pt")
    argv = command(files, tmp_path / "out", gpt=tmp_path / "gpt_256.pt")
    assert main([*argv[:-2], "--overwrite", "false"]) == 0  # without --image_size: it is in the name
    policy = load_policy(tmp_path / "out")
    assert isinstance(policy, LlamaGenPolicy) and policy.grid == (16, 16)
    head = policy.adapter.head.weight
    assert head.dtype == torch.float32 and torch.equal(head, tensors["output.weight"].float())


def test_what_is_written_is_a_policy_like_others(
    files: Path, policy: LlamaGenPolicy, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert policy.grid == (4, 4) and policy.caption_tokens == 120
    sizes = read_sizes(files / "policy")
    assert (sizes.dim, sizes.layers, sizes.codes, sizes.positions) == (64, 3, 512, 16)
    assert sizes.parameters == sum(p.numel() for p in policy.parameters())
    argv = [
        "sample",
        "--model",
        str(files / "policy"),
        "--prompt",
        "a red circle",
        "--num_images",
        "2",
        "--device",
        "cpu",
    ]
    assert main([*argv, "--out", str(tmp_path / "images")]) == 0
    assert (tmp_path / "images" / "00000-1.png").is_file()
    assert not [path.name for path in files.iterdir() if path.name.startswith(".partial")]
    assert "results:" in capsys.readouterr().out


def test_captions_are_in_lower_case_and_end_as_t5_ends_them(policy: LlamaGenPolicy) -> None:
    loud, quiet = policy.condition(["A Photo  of a RED circle", "a photo of a red circle"]).states
    assert torch.equal(loud, quiet)
    ids = policy.tokenizer("a photo of a RED circle")["input_ids"]
    assert policy.tokenizer.convert_ids_to_tokens(ids) == ["▁a", "▁photo", "▁of", "▁a", "▁red", "▁circle", "</s>"]


def test_nothing_is_replaced_unless_told(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(command(files, out)) == 0
    before = (out / "trunk" / "model.safetensors").stat().st_mtime_ns
    assert main(command(files, out)) == 2 and "already holds files; add --overwrite" in capsys.readouterr().err
    assert main(command(files, out, overwrite="true", gpt=tmp_path / "none.pt")) == 2  # fails, and what was there stays
    assert (out / "trunk" / "model.safetensors").stat().st_mtime_ns == before
    assert main(command(files, out, overwrite="true")) == 0
    assert (out / "trunk" / "model.safetensors").stat().st_mtime_ns > before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    assert main(command(files, tmp_path / "mine", overwrite="true")) == 2
    assert "no policy folder wrote" in capsys.readouterr().err and (tmp_path / "mine" / "thesis.txt").is_file()
    torch.save({"model": published("gpt")}, out / "gpt.pt")
    assert main(command(files, out, overwrite="true", gpt=out / "gpt.pt")) == 2
    assert "is to be replaced; name another" in capsys.readouterr().err and (out / "gpt.pt").is_file()


# ---- bad input


def fails(files: Path, out: Path, capsys: pytest.CaptureFixture[str], **options: object) -> str:
    """The one line that the command ends with, having written nothing."""
    capsys.readouterr()
    assert main(command(files, out, **options)) == 2
    message = capsys.readouterr().err
    assert message.startswith("gcpo-t2i: error: ") and message.count("\n") == 1
    assert not out.exists() and not list(out.parent.glob(".partial*"))
    return message


@pytest.mark.parametrize("kind", ["gpt", "vq"])
def test_tensors_that_do_not_fit_are_listed(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    tensors = dict(published(kind))
    *_, absent, odd = (name for name in tensors if "norm" in name)
    del tensors[absent]
    tensors[odd] = torch.ones(3)
    tensors["lm_head.weight"] = torch.ones(2)
    torch.save({"model": tensors}, tmp_path / "odd.pt")
    message = fails(files, tmp_path / "out", capsys, **{kind: tmp_path / "odd.pt"})
    expected = tuple(published(kind)[odd].shape)
    for part in (
        f"1 missing: {absent}", "1 left over: lm_head.weight", f"1 of another shape: {odd} (3,) instead of {expected}",
    ):  # fmt: skip
        assert part in message


def two_layers() -> dict[str, Tensor]:
    return {name: tensor for name, tensor in published("gpt").items() if not name.startswith("layers.2.")}


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, r"no checkpoint at .*hf download peizesun/llamagen_t2i"),
    "text": (lambda path: path.write_text("<!DOCTYPE html>"), "is no PyTorch checkpoint"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"model": 1})), "is no PyTorch checkpoint"),
    "half": (lambda path: path.write_bytes((path.parent / "whole.pt").read_bytes()[:-100]), "is no PyTorch checkpoint"),
    "zip": (lambda path: zipfile.ZipFile(path, "w").writestr("a.txt", "a"), "cannot be read as a PyTorch checkpoint"),
    "code": (lambda path: torch.save({"model": SimpleNamespace()}, path), r"holds a types.SimpleNamespace.*refused"),
    "list": (lambda path: torch.save([torch.ones(2)], path), "holds no state dict.*found a list"),
    "numbers": (lambda path: torch.save({"model": {"a": 1}, "steps": 3}, path), "no state dict.*the keys model, steps"),
    "empty": (lambda path: torch.save({"model": {}}, path), "holds no state dict"),
    "classes": (
        lambda path: torch.save({"model": {"cls_embedding.embedding_table.weight": torch.ones(2)}}, path),
        "conditioned on classes",
    ),
    "other": (
        lambda path: torch.save(published("vq"), path),
        r"no tensor tok_embeddings\.weight; is it another model's",
    ),
    "flat": (lambda path: torch.save({"tok_embeddings.weight": torch.ones(3)}, path), r"shape \(3,\), expected 2"),
    "size": (lambda path: torch.save(two_layers(), path), "2 layers of width 64 are no published size .B 12 × 768"),
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_hold_no_transformer(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    write, problem = BAD[name]
    (tmp_path / "whole.pt").write_bytes((files / "gpt.pt").read_bytes())
    write(tmp_path / "bad.pt")
    message = fails(files, tmp_path / "out", capsys, gpt=tmp_path / "bad.pt")
    assert "bad.pt" in message
    with pytest.raises(AssertionError, match=problem):
        raise AssertionError(message)


def test_options_that_do_not_fit_the_files(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert "is of size tiny, not XL; drop --size" in fails(files, out, capsys, size="XL")
    assert "multiple of 16" in fails(files, out, capsys, image_size=100)
    assert "'M' is not one of B, L, XL, XXL, 3B" in fails(files, out, capsys, size="M")
    assert "add --image_size 256 or 512" in fails(files, out, capsys, image_size="null")
    assert "has no tensor quantize.embedding.weight" in fails(files, out, capsys, vq=files / "gpt.pt")
    tensors = {**published("vq"), "quantize.embedding.weight": torch.ones(7, 8)}
    torch.save({"model": tensors}, tmp_path / "vq.pt")
    assert "knows 512 codes" in fails(files, out, capsys, vq=tmp_path / "vq.pt")


def test_text_encoders_that_do_not_fit(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    narrow = write_text_encoder(tmp_path / "narrow", width=16)
    assert "has width 16, the checkpoint's captions have 32" in fails(files, out, capsys, text_encoder=narrow)
    (narrow / "model.safetensors").rename(narrow / "pytorch_model.bin")
    message = fails(files, out, capsys, text_encoder=narrow)
    assert "has no model.safetensors; get it with: hf download" in message
    clip = tmp_path / "clip"
    CLIPTextConfig().save_pretrained(clip)
    for name in ("model.safetensors", "tokenizer.json"):
        (clip / name).touch()
    assert "is a 'clip_text_model' model, expected a T5" in fails(files, out, capsys, text_encoder=clip)
    broken = write_text_encoder(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    assert f"cannot load {broken}" in fails(files, out, capsys, text_encoder=broken)


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        (
            errors.LocalEntryNotFoundError,
            r"google/flan-t5-xl; config\.json .*is not on this machine.*: hf download google",
        ),
        (
            errors.GatedRepoError,
            r"wants terms to be accepted, at https://huggingface\.co/google/flan-t5-xl; then: hf auth login",
        ),
        (errors.RepositoryNotFoundError, "no such repository on the Hugging Face hub"),
    ],
)
def test_hub_ids_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, kind: Any, problem: str) -> None:
    def raises(*_: object, **__: object) -> str:
        raise kind.__new__(kind, "from the library")

    monkeypatch.setattr("huggingface_hub.snapshot_download", raises)
    with pytest.raises(ValueError, match=f"--text_encoder: .*{problem}"):
        find_text_encoder("google/flan-t5-xl", 2048)


def test_hub_ids_and_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert local_folder(str(tmp_path)) == tmp_path
    with pytest.raises(ValueError, match=r"no folder \./nowhere"):
        find_text_encoder("./nowhere", 2048)
    asked: list[Any] = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: asked.append((a, k)) or str(tmp_path))
    assert local_folder("google/flan-t5-xl") == tmp_path
    ((name,), options) = asked[0]
    assert name == "google/flan-t5-xl" and not [p for p in options["allow_patterns"] if p.endswith((".bin", ".pt"))]


def test_the_saved_config_says_how_caption_positions_are_turned(files: Path) -> None:
    assert json.loads((files / "policy" / "trunk" / "config.json").read_text())["rotary_prefix_cos"] == 0.0
