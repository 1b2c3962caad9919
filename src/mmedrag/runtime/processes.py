"""One process or several: what a training needs to know of the others.

Place in the picture: below every training. Started plainly there is one process; under
``accelerate launch`` or ``torchrun`` every process takes its part of the work.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those of the launch: its rank, their number, and their exchanges."""

    rank: int = 0
    size: int = 1
    given: torch.device | None = None  # the device that the launcher chose

    @classmethod
    def of_launch(cls) -> Processes:
        """As the launcher says (accelerate sets the exchange up); alone where there is none."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available())
        return cls(state.process_index, state.num_processes, state.device)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def device(self, asked: str | None) -> torch.device:
        return self.given or torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))

    def own(self, items: Sequence[T]) -> Sequence[T]:
        """This process's share of independent work."""
        return items[self.rank :: self.size]

    def mine(self, count: int) -> slice:
        """This process's contiguous part of ``count`` rows (sizes differ by at most one)."""
        bounds = [count * r // self.size for r in (self.rank, self.rank + 1)]
        return slice(*bounds)

    def gather(self, rows: torch.Tensor, count: int) -> torch.Tensor:
        """All processes' rows in order, [count, dim]; only one's own carry a gradient."""
        if self.size == 1:
            return rows
        parts = [count * r // self.size for r in range(self.size + 1)]
        sizes = [b - a for a, b in zip(parts, parts[1:], strict=False)]
        padded = torch.zeros(max(sizes), rows.shape[1], device=rows.device, dtype=rows.dtype)
        padded[: len(rows)] = rows.detach()
        found = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(found, padded)
        cut = [part[:n] for part, n in zip(found, sizes, strict=True)]
        cut[self.rank] = rows
        return torch.cat(cut)

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Each process has the part of the gradient that flows through its own rows."""
        if self.size == 1:
            return
        for parameter in parameters:
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)

    def wait(self) -> None:
        if self.size > 1:
            torch.distributed.barrier()
