"""Images ↔ codes: pixel scaling, nearest codes, row order, chunks, and sizes that do not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from gcpo_t2i.models import vq
from tests.test_models_llamagen import random_codes, tiny_vq


def pictures(count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def test_pixels_by_hand_and_back() -> None:
    # 0 → −1, 255 → 1, 51 → 51/127.5 − 1 = −0.6; every one of the 256 levels survives the way back
    array = np.zeros((1, 2, 1, 3), dtype=np.uint8)
    array[0, 1, 0] = (0, 255, 51)
    pixels = vq.to_pixels(array)
    assert pixels.shape == (1, 3, 2, 1)
    torch.testing.assert_close(pixels[0, :, 1, 0], torch.tensor([-1.0, 1.0, -0.6]))
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    assert (np.asarray(vq.to_images(vq.to_pixels(levels))[0]) == levels[0]).all()
    assert np.asarray(vq.to_images(torch.full((1, 3, 1, 1), 7.0))[0]).max() == 255  # clipped


def test_pil_arrays_and_tensors_are_the_same_images() -> None:
    array = pictures()
    pil = [Image.fromarray(image) for image in array]
    assert torch.equal(vq.to_pixels(pil), vq.to_pixels(array))
    assert torch.equal(vq.to_pixels(list(array)), vq.to_pixels(array))
    assert torch.equal(vq.to_pixels(vq.to_pixels(array)), vq.to_pixels(array))
    assert vq.to_pixels([pil[0].convert("L")]).shape == (1, 3, 8, 8)


def test_codes_are_the_nearest_entries_row_by_row() -> None:
    model, array = tiny_vq(), pictures()
    codes = vq.encode_images(model, array, (4, 4))
    assert codes.shape == (3, 16) and codes.dtype == torch.int64
    with torch.no_grad():
        latents = model.encode(vq.to_pixels(array)).latents  # (3, 4, H, W)
    book = model.quantize.embedding.weight
    for row, col in ((0, 0), (1, 2), (3, 1)):
        distance = (latents[:, :, row, col][:, None] - book[None]).pow(2).sum(-1)
        assert torch.equal(codes[:, row * 4 + col], distance.argmin(-1))


@pytest.mark.parametrize("length", [1e-4, 1.0, 1e4])
def test_among_codes_of_length_1_the_length_of_a_latent_does_not_count(length: float) -> None:
    model = tiny_vq(codes=4096)
    with torch.no_grad():
        book = model.quantize.embedding.weight
        book.copy_(F.normalize(torch.randn(book.shape, generator=torch.Generator().manual_seed(0)), dim=1))
        latents = model.encode(vq.to_pixels(pictures(32))).latents.double()  # (32, 4, H, W)
        cosine = torch.einsum("ndhw,kd->nhwk", F.normalize(latents, dim=1), book.double())
        for parameter in model.quant_conv.parameters():
            parameter *= length
    assert torch.equal(vq.encode_images(model, pictures(32), (4, 4)), cosine.argmax(-1).flatten(1))


def test_decoding_is_the_models_own_decoder() -> None:
    model, array = tiny_vq(), pictures()
    with torch.no_grad():
        expected = model(vq.to_pixels(array)).sample  # encode, quantise, decode
    decoded = vq.decode_pixels(model, vq.encode_images(model, array, (4, 4)), (4, 4))
    torch.testing.assert_close(decoded, expected, atol=1e-5, rtol=1e-5)
    images = vq.decode_codes(model, random_codes(2), (4, 4))
    assert [image.size for image in images] == [(8, 8)] * 2 and images[0].mode == "RGB"


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, codes = tiny_vq(), random_codes(5)
    whole = vq.decode_pixels(model, codes, (4, 4)), vq.encode_images(model, pictures(5), (4, 4))
    monkeypatch.setattr(vq, "CHUNK", 2)
    torch.testing.assert_close(vq.decode_pixels(model, codes, (4, 4)), whole[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(vq.encode_images(model, pictures(5), (4, 4)), whole[1])


def test_images_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"images of \(8, 8\) pixels give a code map of \(4, 4\), expected \(6, 6\)"):
        vq.encode_images(tiny_vq(), pictures(), (6, 6))
    for wrong in (pictures().astype(np.float32), pictures()[0]):
        with pytest.raises(ValueError, match="expected a uint8 array"):
            vq.to_pixels(wrong)
    with pytest.raises(ValueError, match="expected float pixels"):
        vq.to_pixels(torch.zeros(1, 8, 8, 3))
