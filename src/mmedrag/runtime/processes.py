"""One process or several: what a training needs to know of the others.

Place in the picture: below every training. Started plainly there is one process; under
``mmedrag launch`` every process takes its part of the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those of the launch: its rank, their number, and their exchanges."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def own(self, items: Sequence[T]) -> Sequence[T]:
        """This process's share of independent work."""
        return items[self.rank :: self.size]

    def bounds(self, count: int) -> list[int]:
        """Where each process's contiguous part of ``count`` rows begins, and the end; sizes differ
        by at most one."""
        return [count * rank // self.size for rank in range(self.size + 1)]

    def mine(self, count: int) -> slice:
        """This process's part of ``count`` rows."""
        return slice(*self.bounds(count)[self.rank : self.rank + 2])

    def gather(self, rows: torch.Tensor, count: int) -> torch.Tensor:
        """All processes' rows in order, [count, dim].

        Backward adds what every process sends back to a row. Where all compute one loss of all
        rows, that is ``size`` times its gradient, which DDP's mean over processes takes out again.
        """
        if self.size == 1:
            return rows
        from torch.distributed.nn import functional

        bounds = self.bounds(count)
        sizes = [end - start for start, end in zip(bounds, bounds[1:], strict=False)]
        padded = torch.nn.functional.pad(rows, (0, 0, 0, max(sizes) - len(rows)))
        parts = functional.all_gather(padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def agree(self, value: T) -> T:
        """What the first process found, in every process."""
        if self.size == 1:
            return value
        held = [value]
        torch.distributed.broadcast_object_list(held)
        return held[0]

    def wait(self) -> None:
        if self.size > 1:
            torch.distributed.barrier()
