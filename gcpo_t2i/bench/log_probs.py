"""The log-probs of an update from hidden states: in chunks, against logits of all positions at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gcpo_t2i.bench.contest import Phases
from gcpo_t2i.bench.rivals import plain_logp
from gcpo_t2i.models import teacher_forcing
from gcpo_t2i.plan.timing import Stopwatch

BATCH, LENGTH, CODES = 16, 576, 16384
WIDTHS = {"cpu": 64, "cuda": 2048}  # of the hidden states


def log_prob_ways(watch: Stopwatch) -> dict[str, Callable[[], Phases]]:
    """Forward and backward of both, under a head that is trained (LlamaGen's) and one that is not (Janus's)."""
    device, generator = watch.device, torch.Generator(watch.device).manual_seed(0)
    width = WIDTHS.get(device.type, WIDTHS["cpu"])
    hidden = torch.randn(BATCH, LENGTH, width, device=device, generator=generator).requires_grad_()
    tokens = torch.randint(CODES, (BATCH, LENGTH), device=device, generator=generator)
    weight = torch.randn(BATCH, LENGTH, device=device, generator=generator)

    def timed(head: nn.Module, logp: Callable[[nn.Module], Tensor]) -> Callable[[], Phases]:
        def both() -> None:
            (logp(head) * weight).sum().backward()

        def run() -> Phases:
            head.zero_grad(set_to_none=True)
            hidden.grad = None
            return {"forward and backward": watch.once(both)}

        return run

    ways = {}
    for kind in ("frozen", "trained"):
        head = nn.Linear(width, CODES, bias=False, device=device).requires_grad_(kind == "trained")
        ways[f"ours, {kind} head"] = timed(head, lambda own: teacher_forcing.score(own, hidden, tokens).logp)
        ways[f"plain, {kind} head"] = timed(head, lambda own: plain_logp(own(hidden), tokens))
    return ways
