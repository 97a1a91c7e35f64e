"""Decisions that the ranks of one engine take together, where each rank runs a complete scheduler."""

from __future__ import annotations

import secrets
from typing import Any


class Agreement:
    """Collective decisions of the ranks of one engine.

    groups: pairs of a process group and its size; groups of one rank are ignored. device: where the reduced tensors are.
    """

    def __init__(self, *groups: tuple[Any, int], device: str = "cpu") -> None:
        self._groups = [group for group, size in groups if size > 1]
        self._device = device

    def reduce(self, tensor: Any, operation: Any) -> None:
        """All-reduce a tensor in place."""
        import torch

        for group in self._groups:
            torch.distributed.all_reduce(tensor, op=operation, group=group)

    def least(self, number: int) -> int:
        """Return the smallest of the ranks' numbers."""
        if not self._groups:
            return number
        import torch

        tensor = torch.tensor([number], dtype=torch.int64, device=self._device)
        self.reduce(tensor, torch.distributed.ReduceOp.MIN)
        return int(tensor.item())

    def name(self, engine: str) -> str:
        """Return a unique name for an engine of this kind, the same in all ranks."""
        return f"{engine}-{self.least(secrets.randbits(62)):016x}"
