"""What the processes of one run tell each other. All of them must call the same methods in the same order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object, reduce
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """`count` processes, of which this is number `index`."""

    index: int = 0
    count: int = 1

    @classmethod
    def of(cls, accelerator: Accelerator) -> Processes:
        return cls(accelerator.process_index, accelerator.num_processes)

    def gather(self, own: T) -> list[T]:
        """What each of them has, by number."""
        return [own] if self.count == 1 else gather_object([own])

    def sum(self, own: Tensor) -> Tensor:
        """The sum of their tensors, all of one shape."""
        if self.count == 1:
            return own
        total: Any = reduce(own, "sum")
        return total


ALONE = Processes()
