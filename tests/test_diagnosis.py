"""Verdict and causes of a short run, on curves made by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from gcpo_t2i.diagnosis import Finding, Trend, curve, faults, spread, trend, verdict, why_not

HEALTHY = {
    "reward_std": 0.1,
    "frac_reward_zero_std": 0.0,
    "diversity": 0.8,
    "logp_gap/replay": 1e-4,
    "grad_norm": 0.3,
    "skipped": 0.0,
    "kl": 0.01,
    "entropy": 1.0,
}


def rows(count: int = 10, **changes: Any) -> list[dict[str, Any]]:
    return [HEALTHY | {key.replace("gap", "logp_gap/replay"): value for key, value in changes.items()}] * count


def causes(found: list[dict[str, Any]]) -> list[str]:
    return [finding.cause for finding in faults(found)]


def why(found: list[dict[str, Any]], gain: float = 0.0, error: float = 0.0, rate: float = 1e-3) -> Finding:
    return why_not(found, Trend(0.5, gain, error), 0.1, rate)


def test_trend_of_a_straight_line_is_exact() -> None:
    line = trend([0.1, 0.2, 0.3, 0.4, 0.5])
    assert (line.start, line.gain) == (pytest.approx(0.1), pytest.approx(0.4))
    assert line.error == pytest.approx(0, abs=1e-12)


def test_trend_by_hand() -> None:
    # steps −1.5 … 1.5, squares 5; slope (−1.5·0 − 0.5·2 + 0.5·1 + 1.5·3) / 5 = 0.8; mean 1.5; line 0.3 1.1 1.9 2.7;
    # residuals −0.3 0.9 −0.9 0.3, squares 1.8, variance 1.8 / 2; error of the slope √(0.9 / 5), of the gain 3 times that
    line = trend([0, 2, 1, 3])
    assert (line.start, line.gain) == (pytest.approx(0.3), pytest.approx(2.4))
    assert line.error == pytest.approx(3 * math.sqrt(0.18))


@pytest.mark.parametrize(
    ("gain", "error", "expected"),
    [
        (0.31, 0.1, "learns"),
        (0.29, 0.1, "unclear"),  # 0 and half a standard deviation (0.5) are both within three standard errors
        (0.1, 0.1, "does not learn"),  # 0.1 + 0.3 < 0.5
        (-0.9, 0.1, "does not learn"),
        (0.1, 0.2, "unclear"),
        (0.0, 0.0, "does not learn"),
        (0.001, 0.0, "learns"),
    ],
)
def test_verdicts_in_units_of_noise(gain: float, error: float, expected: str) -> None:
    assert verdict(Trend(0.5, gain, error), unit=1.0) == expected


def test_what_stops_learning_outweighs_a_curve_that_rises() -> None:
    findings = faults(rows(grad_norm=0.0))
    assert verdict(Trend(0.5, 1.0, 0.1), 1.0, findings) == "does not learn"
    warned = faults(rows(gap=0.2))
    assert verdict(Trend(0.5, 1.0, 0.1), 1.0, warned) == "learns" and len(warned) == 1


def test_the_spread_is_that_of_the_start() -> None:
    assert spread(rows(3, reward_std=0.2) + rows(9, reward_std=0.0)) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"frac_reward_zero_std": 0.5}, "no signal in groups"),
        ({"frac_reward_zero_std": 1.0, "grad_norm": 0.0}, "no signal in groups"),  # and not its consequence
        ({"gap": 0.06}, "gap between rollout and replay"),
        ({"grad_norm": 0.0}, "zero gradients"),
        ({"skipped": 1.0, "grad_norm": math.nan}, "loss not finite"),
        ({"kl": 9e-9}, "learning rate too low"),
    ],
)
def test_each_fault_is_found_alone(changes: dict[str, Any], cause: str) -> None:
    assert causes(rows(**changes)) == [cause]


def test_a_healthy_run_has_no_faults() -> None:
    assert causes(rows()) == []
    assert causes(rows(kl=None)) == []
    assert causes(rows(frac_reward_zero_std=0.49, gap=0.049, kl=1.1e-8)) == []


def test_signal_that_is_lost_on_the_way_has_another_cause() -> None:
    lost = rows(1) + rows(9, frac_reward_zero_std=1.0, kl=5.0)
    assert causes(lost) == [] and why(lost).cause == "learning rate too high"


def test_a_rate_is_too_high_where_the_kl_or_the_entropy_says_so() -> None:
    assert why(rows(kl=0.51)).cause == "learning rate too high" and "to 0.0003" in why(rows(kl=0.51)).cure
    assert why(rows(kl=0.49)).cause == "learning rate too low"
    assert why(rows(5, kl=None) + rows(5, kl=None, entropy=0.19)).cause == "learning rate too high"
    assert why(rows(5, kl=None) + rows(5, kl=None, entropy=0.21)).cause == "learning rate too low"


def test_noise_that_hides_a_gain_is_no_proof_of_a_low_rate() -> None:
    found = why(rows(), gain=0.01, error=0.02)  # ± 3 · 0.02, and half of the spread is 0.05
    assert found.cause == "too much noise" and "from -0.05 to +0.07" in found.seen


def test_the_factor_for_the_learning_rate_follows_from_the_kl() -> None:
    assert "about 10 times, to 0.01" in why(rows(kl=2e-4)).cure  # √(0.02 / 2e-4) = 10
    assert "about 2 times" in why(rows(kl=0.1)).cure  # never less
    assert "about 100 times" in why(rows(kl=1e-7)).cure  # never more at once
    assert "tenfold, to 0.01" in why(rows(kl=None)).cure


def test_the_curve_as_a_person_sees_it() -> None:
    values = [0.0, 0.25, 1.0]
    picture = curve(values, Trend(0.0, 1.0, 0.0), height=5)
    assert picture.splitlines() == [
        "   1.0000 │       ●",
        "          │",
        "          │    ·",
        "          │    ●",
        "   0.0000 │ ●",
        "          └─────────",
        "     step   1     3",
    ]
    flat = curve([0.5, 0.5, 0.5], Trend(0.5, 0.0, 0.0), height=3)
    assert flat.count("●") == 3
