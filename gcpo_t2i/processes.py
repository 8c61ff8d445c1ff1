"""What the processes of one run tell each other. All of them must call the same methods in the same order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from gcpo_t2i.errors import ProcessLost, UserError, everywhere

T = TypeVar("T")
BUCKET = 1 << 26  # bytes of tensors that are summed in one call


@dataclass(frozen=True)
class Processes:
    """`count` processes, of which this is number `index`. ProcessLost from every method if one of the others has ended."""

    index: int = 0
    count: int = 1

    @classmethod
    def of(cls, accelerator: Accelerator) -> Processes:
        return cls(accelerator.process_index, accelerator.num_processes)

    def gather(self, own: T) -> list[T]:
        """What each of them has, by number."""
        if self.count == 1:
            return [own]
        found: list[Any] = [None] * self.count
        with _talking():
            dist.all_gather_object(found, own, group=_gloo())
        return found

    def together(self, call: Callable[[], T], kind: type[UserError] = UserError) -> T:
        """What `call` returns, if it fails in none of them; else all raise what the first one raised, of that kind."""
        if self.count == 1:
            return call()
        result, error = None, None
        try:
            result = call()
        except kind as own:
            error = own
        if told := [text for text in self.gather(None if error is None else str(error)) if text is not None]:
            raise everywhere(kind(told[0])) from error
        return result  # type: ignore[return-value]

    def sum(self, own: Tensor) -> Tensor:
        """The sum of their tensors, all of one shape."""
        total = own.clone()
        self.sum_each([total])
        return total

    def sum_each(self, tensors: Sequence[Tensor]) -> None:
        """Puts into each of these tensors the sum of what the processes have in it."""
        if self.count == 1:
            return
        for bucket in buckets(tensors, BUCKET):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            with _talking():
                dist.all_reduce(flat)
            for tensor, total in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(total.view_as(tensor))


def buckets(tensors: Sequence[Tensor], size: int) -> Iterator[list[Tensor]]:
    """The tensors in their order, in lists of one dtype and of at most `size` bytes, or of one tensor."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or sum(other.nbytes for other in bucket) + tensor.nbytes > size):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


@cache
def _gloo() -> Any:
    """The group through which objects go: on the CPU, where a process that has ended is noticed at once."""
    return dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


@contextmanager
def _talking() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # of gloo and of NCCL alike
        raise ProcessLost(f"the other processes of this run cannot be reached: {str(error).split('. ')[0]}") from error


ALONE = Processes()
