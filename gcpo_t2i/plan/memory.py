"""Expected memory of one process by part, in bytes, from sizes alone.

Letters: b images and S positions of a micro-batch, R rows that decode at once, T codes of an image, V codes in all,
D width, H heads of d channels, M width of the MLP, N layers; f = 4 bytes, and c = 4, or 2 where layers run in bfloat16.

*Resident* parts exist all the time: weights 4n, the same for a reference, gradients and AdamW's two moments 4t + 8t of
t trained parameters; where these are sharded, a share of the learner, of its reference and of its states beside the whole
weights. With LoRA adapters these are t, the weights that they stand beside are c·n, and there is no
reference. A *rollout* holds its cache, an *update* its activations, and the two never exist together. On a GPU the peak
is therefore the resident parts and the larger of the two. On a CPU it is the sum: the C library keeps what an update
frees in pieces too small for the next cache, which comes on top. (The activations are tested against what autograd keeps,
in both precisions and with both kinds of attention. The peak was compared with runs on CPUs only: see
docs/reliability.md.)
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass

import torch

from gcpo_t2i.config import PlanConfig
from gcpo_t2i.models.attention import blocks
from gcpo_t2i.models.cache import whole_blocks
from gcpo_t2i.models.drawing import NULL_HIDDEN
from gcpo_t2i.models.layers import COPY_BYTES
from gcpo_t2i.models.sizes import Sizes
from gcpo_t2i.models.teacher_forcing import SCORE_BUDGET
from gcpo_t2i.models.vq import CHUNK
from gcpo_t2i.plan.counts import Counts
from gcpo_t2i.rollout import kept_stats
from gcpo_t2i.run import use_bfloat16

FLOAT = 4  # bytes


@dataclass(frozen=True)
class Precision:
    """What the layers run in, how the trunk attends, and what of it is trained and kept for the backward pass."""

    lower: bool = False  # bfloat16 by autocast
    stores_attention: bool = True  # attention in blocks, as on a CPU, keeps its probabilities for the backward pass
    adapters: int = 0  # LoRA: ranks of all adapters of a layer; 0 = the weights themselves are trained
    recomputes: bool = False  # gradient checkpointing

    @property
    def compute(self) -> int:
        """c, the bytes per element of what a linear layer returns."""
        return 2 if self.lower else FLOAT

    @property
    def residual(self) -> int:
        """Bytes per element of what goes from layer to layer: that of the weights."""
        return self.compute if self.adapters else FLOAT

    @classmethod
    def of(cls, config: PlanConfig, device: torch.device) -> Precision:
        adapters = (config.lora.rank or 0) * len(config.lora.targets)
        lower, on_cpu = use_bfloat16(config.dtype, device), device.type == "cpu"
        return cls(lower, on_cpu, adapters, config.gradient_checkpointing)


@dataclass(frozen=True)
class Memory:
    """Bytes by part. `libraries` and `rewards` are measured, all others follow from the sizes."""

    libraries: int
    rewards: int
    weights: int
    reference: int
    gradients: int
    optimizer: int
    cache: int
    engine: int
    image_decoder: int
    log_probs: int
    logits: int
    activations: int
    attention: int
    on_gpu: bool

    @property
    def resident(self) -> int:
        fixed = self.libraries + self.rewards + self.weights + self.reference
        return fixed + self.gradients + self.optimizer + self.log_probs

    @property
    def peak(self) -> int:
        rollout, update = (
            max(self.cache + self.engine, self.image_decoder),
            self.logits + self.activations + self.attention,
        )
        return self.resident + (max(rollout, update) if self.on_gpu else rollout + update)

    def parts(self) -> dict[str, int]:
        return {name: size for name, size in asdict(self).items() if name != "on_gpu"}

    @classmethod
    def of(
        cls,
        config: PlanConfig,
        sizes: Sizes,
        counts: Counts,
        prefix: int,
        device: torch.device,
        libraries: int,
        rewards: int,
    ) -> Memory:
        """`prefix` is the number of caption tokens; `libraries` and `rewards` are what was measured of them."""
        on_gpu = device.type != "cpu"
        precision = Precision.of(config, device)
        eval_rows = min(config.eval.batch_size, counts.eval_images) * counts.eval_branches
        weights = weight_bytes(sizes, precision)
        learning = sizes.trainable - (spread(sizes, config.processes) if config.sharded else 0)
        reference = FLOAT * learning if config.sharded else weights
        return cls(
            libraries=libraries,
            rewards=rewards,
            weights=weights + (FLOAT * learning if config.sharded else 0),
            reference=reference if counts.reference_passes and not precision.adapters else 0,
            gradients=FLOAT * learning,
            optimizer=2 * FLOAT * learning,
            cache=cache_bytes(sizes, max(counts.rows, eval_rows), prefix, precision, grows=not on_gpu),
            engine=engine_bytes(sizes, precision),
            image_decoder=image_bytes(sizes, max(counts.at_once, config.eval.batch_size)),
            log_probs=log_prob_bytes(sizes, counts.images, precision, kept_stats(config, ())),
            logits=logit_bytes(sizes, counts.micro_batch),
            activations=activation_bytes(sizes, counts.micro_batch, prefix, precision),
            attention=attention_bytes(sizes, counts.micro_batch, prefix, precision),
            on_gpu=on_gpu,
        )


def weight_bytes(sizes: Sizes, precision: Precision) -> int:
    """float32; with adapters, all but them and what is float32 always in the precision of the layers."""
    if not precision.adapters:
        return FLOAT * sizes.parameters
    exact = sizes.trainable + sizes.float_parameters
    return FLOAT * exact + precision.compute * (sizes.parameters - exact)


def spread(sizes: Sizes, processes: int) -> int:
    """Parameters of the trunk's layers that a process leaves to the others where they are sharded."""
    width, kv_width = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    layer = sizes.dim * (2 * width + 2 * kv_width + 3 * sizes.mlp_dim + 2)  # projections, MLP, two norms
    return sizes.layers * layer * (processes - 1) // processes


def cache_bytes(sizes: Sizes, rows: int, prefix: int, precision: Precision, grows: bool) -> int:
    """Keys and values of R rows at the end of a rollout: 2·N·R·kv heads·C·d·c, and the mask R·C·c.

    C is prefix + T − 1 positions in whole blocks (the last code is not fed back). Where the cache `grows`, one tensor
    of one layer is there twice, and the mask once for each kv head.
    """
    capacity = whole_blocks(prefix + sizes.positions - 1)
    tensor = rows * sizes.kv_heads * capacity * sizes.head_dim * precision.compute
    masks = sizes.kv_heads if grows else 1
    return (2 * sizes.layers + grows) * tensor + rows * masks * capacity * precision.compute


def engine_bytes(sizes: Sizes, precision: Precision) -> int:
    """The linear layers of the trunk as a rollout reads them, in c bytes; nothing where a copy in the precision of the weights
    would be large. (On a GPU it is made of a quarter of what is free.)"""
    width, kv_width = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    copied = precision.compute * sizes.layers * sizes.dim * (2 * width + 2 * kv_width + 3 * sizes.mlp_dim)
    cast = precision.lower and not precision.adapters
    return copied if cast or copied <= COPY_BYTES else 0


def activation_bytes(sizes: Sizes, batch: int, prefix: int, precision: Precision) -> int:
    """What the trunk keeps of a micro-batch for its backward pass, without attention matrices.

    Recomputed layers keep their input, and one of them at a time all of its own. Else, per layer and position of b·S,
    S = prefix + T − 1: two norms keep their input, the normalised input and what the next linear layers read (in bfloat16
    one copy for each of them: q, k, v; gate, up); attention keeps q, k, v and its output, 4·H·d·c; the MLP keeps gate,
    silu(gate), up and their product, 4·M·c. Then one more norm. In bfloat16 the cast weights are kept as well. Frozen
    norms do not keep the normalised input; an adapter keeps its rank·c, and in bfloat16 one more copy of what fused
    attention returned.
    """
    layer = layer_bytes(sizes, precision)
    positions = batch * (prefix + sizes.positions - 1)
    cast = 2 * sizes.trainable if precision.lower else 0
    layers = sizes.layers * precision.residual * sizes.dim + layer if precision.recomputes else sizes.layers * layer
    return positions * (layers + 3 * FLOAT * sizes.dim) + cast


def layer_bytes(sizes: Sizes, precision: Precision) -> int:
    """Of one layer and position, see `activation_bytes`."""
    c, width, frozen = precision.compute, sizes.heads * sizes.head_dim, bool(precision.adapters)
    copies = (3, 2) if precision.lower else (1, 1)
    norms = sum(((1 if frozen else 2) * FLOAT + count * c) * sizes.dim for count in copies)
    again = frozen and precision.lower and not precision.stores_attention
    return norms + (5 if again else 4) * width * c + 4 * sizes.mlp_dim * c + precision.adapters * c


def attention_bytes(sizes: Sizes, batch: int, prefix: int, precision: Precision) -> int:
    """What attention keeps of a micro-batch, b·H times the pairs of query and key in its blocks: per layer the probabilities
    (in bfloat16 two copies), and three more for the block at work, whose layer is alone where layers are recomputed. 0
    where a fused kernel never writes them down."""
    if not precision.stores_attention:
        return 0
    length = prefix + sizes.positions - 1
    pairs = [(rows.stop - rows.start) * seen.stop for rows, seen in blocks(length, length)]
    kept = FLOAT + 2 if precision.lower else FLOAT
    layers = 1 if precision.recomputes else sizes.layers
    return batch * sizes.heads * (layers * kept * sum(pairs) + 3 * FLOAT * max(pairs))


def logit_bytes(sizes: Sizes, batch: int) -> int:
    """Float32 logits of a micro-batch, (b, T, V) or as many as the scoring budget allows at once, and two gradients."""
    return 3 * FLOAT * min(batch * sizes.positions * sizes.codes, max(SCORE_BUDGET, batch * sizes.codes))


def log_prob_bytes(sizes: Sizes, images: int, precision: Precision, kept: Collection[str]) -> int:
    """Per code of a step: the token (8), three log-probs and the entropy of the rollout, old log-probs, credit and two
    weights, float32; and the outputs of the null branch, D·c, where the rollout keeps them."""
    outputs = sizes.dim * precision.residual if NULL_HIDDEN in kept else 0
    return images * sizes.positions * (8 + 8 * FLOAT + outputs)


def image_bytes(sizes: Sizes, images: int) -> int:
    """Three of the image decoder's largest feature maps, for as many images as it decodes at once."""
    return 3 * FLOAT * min(images, CHUNK) * sizes.image_elements
