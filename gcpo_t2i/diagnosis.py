"""Does a short run learn, and if not, why not? Pure functions on the metrics of its steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Rows = Sequence[dict[str, Any]]  # the metrics of every step, as in metrics.jsonl
Verdict = Literal["learns", "does not learn", "unclear"]

SIGMAS = 3  # standard errors: a run that does not learn is called one that does in 1 of 250 probes
WORTH = 0.5  # a gain worth finding, in standard deviations of the reward among the images of a prompt
FEW_SIGNALS = 0.5  # share of groups without signal from which they are the likely cause
LARGE_GAP = 0.05  # nats per code; rounding to bfloat16 makes 3e-4 in the embedded model, and float32 5e-7
LARGE_KL = 0.5  # nats per code
STILL_KL = 1e-8  # nats per code, below what float32 resolves
USEFUL_KL = 0.02  # nats per code after 20 steps that learn


@dataclass(frozen=True)
class Trend:
    """The straight line through a curve of rewards (least squares)."""

    start: float  # its value at the first step
    gain: float  # its change from the first step to the last
    error: float  # standard error of the gain, if the steps are independent


@dataclass(frozen=True)
class Finding:
    """Something that is wrong. `stops`: nothing can be learned with it, whatever the curve looks like."""

    cause: str
    seen: str
    cure: str
    stops: bool = False

    def __str__(self) -> str:
        return f"{self.cause}: {self.seen}; {self.cure}"


def trend(values: Sequence[float]) -> Trend:
    """Least squares through (0, v₀) … (n−1, vₙ₋₁), n ≥ 3."""
    steps = np.arange(len(values)) - (len(values) - 1) / 2
    squares = float(steps @ steps)
    mean, slope = float(np.mean(values)), float(steps @ np.asarray(values, dtype=float)) / squares
    residuals = np.asarray(values) - mean - slope * steps
    error = math.sqrt(float(residuals @ residuals) / (len(values) - 2) / squares)
    span = len(values) - 1
    return Trend(mean - slope * span / 2, slope * span, error * span)


def spread(rows: Rows) -> float:
    """Standard deviation of the reward among the images of a prompt, at the start: what an image can differ by."""
    return float(np.mean([row["reward_std"] for row in rows[:3]]))


def verdict(line: Trend, unit: float, findings: Sequence[Finding] = ()) -> Verdict:
    """`learns` if the gain is above 0 beyond the noise, `does not learn` if a gain of half a `unit` (the spread) can be
    excluded or a finding stops all learning, else `unclear`."""
    if any(finding.stops for finding in findings):
        return "does not learn"
    if line.gain > SIGMAS * line.error:
        return "learns"
    return "does not learn" if line.gain + SIGMAS * line.error < WORTH * unit else "unclear"


def faults(rows: Rows) -> list[Finding]:
    """What is wrong with a set-up, the cause before its consequences; [] if all is healthy.

    A reward that rises does not hide them: log-probs that are off by a little still teach something.
    """
    found = [_not_finite(rows), _no_signal(rows), _replay_gap(rows), _zero_gradient(rows)]
    return [fault for fault in found if fault is not None] or ([_standstill(rows)] if _stands_still(rows) else [])


def why_not(rows: Rows, line: Trend, unit: float, learning_rate: float) -> Finding:
    """The likely cause where a set-up without faults was not seen to learn."""
    moved = [row["kl"] for row in rows if row["kl"] is not None]
    start, end = _mean(rows[:3], "entropy"), _mean(rows[-3:], "entropy")
    if max(moved, default=0.0) > LARGE_KL or end < start / 5:
        far = f"KL to the start up to {max(moved):.2g} nats per code, " if moved else ""
        seen, cure = f"{far}entropy {start:.2g} → {end:.2g}", f"to {learning_rate / 4:.1g}"
        return Finding("learning rate too high", seen, f"lower --optim.learning_rate (now {learning_rate:g}) {cure}")
    if verdict(line, unit) == "unclear":
        seen = f"the gain may be anything from {line.gain - SIGMAS * line.error:+.2g} to {line.gain + SIGMAS * line.error:+.2g}"
        return Finding("too much noise", seen, "probe with --steps 30 and a larger --prompts_per_step")
    seen = "signal, log-probs and gradients are healthy, and the reward does not rise"
    if not moved:
        return Finding("learning rate too low", seen, f"raise --optim.learning_rate tenfold, to {10 * learning_rate:g}")
    # the KL grows with the square of the way that the weights went, and that with the rate
    factor = round(min(max(math.sqrt(USEFUL_KL / max(moved)), 2), 100))
    cure = f"raise --optim.learning_rate about {factor} times, to {factor * learning_rate:.1g}"
    return Finding("learning rate too low", f"{seen}; KL to the start {max(moved):.1g} nats per code", cure)


def _mean(rows: Rows, key: str) -> float:
    """Over the steps where it was measured; NaN if it never was."""
    found = [row[key] for row in rows if row.get(key) is not None and math.isfinite(row[key])]
    return sum(found) / len(found) if found else math.nan


def _not_finite(rows: Rows) -> Finding | None:
    bad = sum(row["skipped"] > 0 for row in rows)
    if not bad:
        return None
    cure = "use --dtype float32, and look for log-probs that are not finite in the model"
    return Finding("loss not finite", f"NaN or infinity in {bad} of {len(rows)} steps", cure, stops=bad > len(rows) / 2)


def _no_signal(rows: Rows) -> Finding | None:
    share, alike = _mean(rows, "frac_reward_zero_std"), 1 - _mean(rows, "diversity")
    if min(share, rows[0]["frac_reward_zero_std"]) < FEW_SIGNALS:  # what is lost on the way has another cause
        return None
    seen = f"in {share:.0%} of the groups all images got the same reward; they agree in {alike:.0%} of their codes"
    cure = "raise --temperature, lift --top_k and --top_p, or use a larger --group_size"
    return Finding("no signal in groups", seen, cure, stops=share == 1)


def _replay_gap(rows: Rows) -> Finding | None:
    gap = _mean(rows, "logp_gap/replay")
    if not gap > LARGE_GAP:
        return None
    seen = f"the log-probs of the sampled codes differ by {gap:.2g} nats when they are scored again"
    cure = "try --dtype float32; if it stays, sample() and logp() of the model do not compute the same distribution"
    return Finding("gap between rollout and replay", seen, cure)


def _zero_gradient(rows: Rows) -> Finding | None:
    norms = [row["grad_norm"] for row in rows if math.isfinite(row["grad_norm"])]
    if not norms or max(norms) > 0 or _mean(rows, "frac_reward_zero_std") == 1:
        return None
    cure = "see which parameters the model's set_trainable() returns, and whether its logp() depends on them"
    return Finding("zero gradients", "the gradient is exactly 0 although rewards differ", cure, stops=True)


def _stands_still(rows: Rows) -> bool:
    moved = [row["kl"] for row in rows if row["kl"] is not None]
    return bool(moved) and max(moved) < STILL_KL


def _standstill(rows: Rows) -> Finding:
    seen = f"there are gradients, and after {len(rows)} steps the policy is still the one of the start (KL 0)"
    return Finding("learning rate too low", seen, "raise --optim.learning_rate by orders of magnitude", stops=True)


def curve(values: Sequence[float], line: Trend, height: int = 9, column: int = 3) -> str:
    """The values as points ● and the line through them as ·, with both axes, for a terminal."""
    fitted = [line.start + line.gain * i / (len(values) - 1) for i in range(len(values))]
    low, high = min(*values, *fitted), max(*values, *fitted)
    scale = (height - 1) / (high - low) if high > low else 0.0
    grid = [[" "] * (column * len(values)) for _ in range(height)]
    for mark, series in (("·", fitted), ("●", values)):
        for i, value in enumerate(series):
            grid[height - 1 - round((value - low) * scale)][column * i] = mark
    labels = {0: f"{high:.4f}", height - 1: f"{low:.4f}"}
    lines = [f"{labels.get(r, ''):>9} │ {''.join(cells)}".rstrip() for r, cells in enumerate(grid)]
    last = str(len(values))
    axis = f"{'':>9} └{'─' * (column * len(values))}"
    return "\n".join([*lines, axis, f"{'step':>9}   1{last:>{column * (len(values) - 1)}}"])
