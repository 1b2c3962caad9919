"""One process or several: what a training needs to know of the others.

Place in the picture: below ``train_retriever``. Started plainly there is one process; under
``accelerate launch`` or ``torchrun`` every process encodes its part of a batch, and the loss
sees all of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch


class World:
    """Rank, size and the exchanges between processes (accelerate sets them up)."""

    def __init__(self) -> None:
        self.rank, self.size, self._device = 0, 1, None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            state = PartialState(cpu=not torch.cuda.is_available())
            self.rank, self.size = state.process_index, state.num_processes
            self._device = state.device

    def device(self, asked: str | None) -> torch.device:
        if self._device is not None:
            return self._device
        return torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def main(self) -> bool:
        return self.rank == 0

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
