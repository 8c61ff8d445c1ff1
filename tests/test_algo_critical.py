"""Critical tokens against a loop that follows the paper code by code, and numbers by hand."""

from __future__ import annotations

import math

import pytest
import torch

from gcpo_t2i.algo.critical import confidence_weight, critical_tokens, smoothed, steepness
from gcpo_t2i.algo.groups import group_similarity


def tensors(groups: int, group: int, side: int, seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    entropy = torch.rand(groups * group, side * side, generator=draw) * 5
    vectors = torch.randn(groups, group, side, side, 3, generator=draw)
    return {"entropy": entropy, "code_vectors": vectors}, torch.ones_like(entropy, dtype=torch.bool)


def test_smoothing_and_slope_by_hand():
    maps = torch.tensor([[[0.0, 3.0, 6.0], [1.0, 2.0, 9.0]]])
    # (1,0): left none, upper left none, above 0, upper right 3, own 1. (1,1): 1, 0, 3, 6, own 2. (1,2): 2, 3, 6, own 9
    expected = [[0.0, 1.5, 4.5], [4 / 3, 12 / 5, 20 / 4]]
    torch.testing.assert_close(smoothed(maps), torch.tensor([expected]))
    slope = steepness(maps.flatten(1), (2, 3)).view(2, 3)
    assert slope[0, 1].item() == pytest.approx(math.hypot((4.5 - 0) / 2, 12 / 5 - 1.5))  # central along, one-sided down
    assert slope[1, 2].item() == pytest.approx(math.hypot(5 - 12 / 5, 5 - 4.5))


def test_similarity_of_a_group_by_hand():
    # three images, one code: cosines of the pairs 0, 1/√2, 1/√2; lengths do not matter
    vectors = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]]).view(1, 3, 1, 1, 2)
    assert group_similarity(vectors).item() == pytest.approx((0 + 2 / math.sqrt(2)) / 3)


def slow_critical(entropy: list[list[float]], vectors: torch.Tensor) -> list[list[bool]]:
    """One image after the other, one code after the other."""
    _, group, height, width, _ = vectors.shape
    places = height * width
    tenth = int(places * 0.1)
    chosen = []
    for image, values in enumerate(entropy):
        p = image // group
        means = [[0.0] * width for _ in range(height)]
        for y in range(height):
            for x in range(width):
                near = [values[y * width + x]]
                for dy, dx in ((0, -1), (-1, -1), (-1, 0), (-1, 1)):
                    if y + dy >= 0 and 0 <= x + dx < width:
                        near.append(values[(y + dy) * width + x + dx])
                means[y][x] = sum(near) / len(near)
        steep = {}
        for place in range(tenth, tenth + int(places * 0.8)):
            y, x = divmod(place, width)
            left, right, up, down = max(x - 1, 0), min(x + 1, width - 1), max(y - 1, 0), min(y + 1, height - 1)
            along = (means[y][right] - means[y][left]) / (right - left)
            steep[place] = math.hypot(along, (means[down][x] - means[up][x]) / (down - up))
        edges = sorted(steep, key=lambda place: -steep[place])[:tenth]
        alike = {}
        for place in range(places):
            if place >= tenth and place not in edges:
                own = [vectors[p, g, place // width, place % width] for g in range(group)]
                pairs = [torch.cosine_similarity(a, b, dim=0).item() for a in own for b in own if a is not b]
                alike[place] = sum(pairs) / len(pairs)
        different = sorted(alike, key=lambda place: alike[place])[:tenth]
        chosen.append([place < tenth or place in edges or place in different for place in range(places)])
    return chosen


@pytest.mark.parametrize("side", [5, 8, 12])
def test_against_a_slow_loop(side):
    given, mask = tensors(2, 3, side, seed=side)
    found = critical_tokens(given, mask)
    assert found.tolist() == slow_critical(given["entropy"].tolist(), given["code_vectors"])
    assert (found.sum(dim=1) == 3 * int(side * side * 0.1)).all()  # the three tenths are disjoint


def test_images_of_a_group_share_their_places_of_diversity_but_not_their_edges():
    given, mask = tensors(1, 4, 12)
    assert len({tuple(row) for row in critical_tokens(given, mask).tolist()}) > 1
    given["entropy"] = given["entropy"][:1].expand(4, -1)
    assert len({tuple(row) for row in critical_tokens(given, mask).tolist()}) == 1


def test_fewer_than_ten_codes_and_invalid_ones():
    given, mask = tensors(1, 2, 3)
    assert (critical_tokens(given, mask).sum(dim=1) == 3).all() and critical_tokens(given, mask)[:, 0].all()
    assert not critical_tokens(given, torch.zeros_like(mask)).any()


def test_confidence_weight_by_hand():
    logp, ref = torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[-1.0, -1.8, -9.0]])
    # exp of 0, −0.2, and 6 cut to 0.5; then running means
    each = [1.0, math.exp(-0.2), math.exp(0.5)]
    expected = [each[0], sum(each[:2]) / 2, sum(each) / 3]
    assert confidence_weight(logp, ref)[0].tolist() == pytest.approx(expected)
    assert (confidence_weight(logp, logp) == 1).all()


def test_confidence_weight_has_no_gradient():
    """Published code lets it have one, so that codes outside of the selection are trained through the running mean."""
    logp = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
    weight = confidence_weight(logp, torch.full((1, 3), -1.5))
    assert not weight.requires_grad
    (logp.exp() * weight)[:, 2].sum().backward()
    assert logp.grad is not None and logp.grad[0, :2].tolist() == [0, 0]
