"""What the ranks of one engine decide together, where each of them runs the whole scheduler."""

from __future__ import annotations

import secrets
from typing import Any


class Agreement:
    """What the ranks of one engine say together.

    groups: each a process group and its size; those of one rank are left out. device: of the tensors that the groups reduce.
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
        """The smallest of the numbers that the ranks have."""
        if not self._groups:
            return number
        import torch

        tensor = torch.tensor([number], dtype=torch.int64, device=self._device)
        self.reduce(tensor, torch.distributed.ReduceOp.MIN)
        return int(tensor.item())

    def name(self, engine: str) -> str:
        """A name for an engine of this kind that no other has, the same in all ranks."""
        return f"{engine}-{self.least(secrets.randbits(62)):016x}"
