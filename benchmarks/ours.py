"""Our side as the scenarios see it: the engine of `lmcache bench`, of the shape that was asked for."""

from __future__ import annotations

from benchmarks.scenarios import Shape
from lmcache.bench.engine import BenchEngine, Model


class OurCache(BenchEngine):
    """`benchmarks.scenarios.Cache` over our scheduler and worker sessions."""

    def __init__(self, shape: Shape, address: str, threads: int, scheduler_only: bool = False) -> None:
        model = Model(shape.name, shape.layers, shape.heads, shape.head_size, shape.blocks, shape.block_tokens)
        super().__init__(model, address, threads, scheduler_only)
        self.shape = shape
        if self.chunk_tokens != shape.chunk_tokens:
            raise RuntimeError(
                f"the server has chunks of {self.chunk_tokens} tokens, the benchmark wants {shape.chunk_tokens}"
            )
