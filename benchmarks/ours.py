"""Our side as the scenarios see it: the engine of `lmcache bench`, of the shape that was asked for."""

from __future__ import annotations

import time

from benchmarks.scenarios import Shape
from lmcache.bench.engine import BenchEngine, Model, Prompt
from lmcache.engine.scheduler import Loading


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

    def lookup(self, prompt: Prompt, pause_seconds: float = 0.0) -> int:
        chain = self._chain(prompt)
        while isinstance(found := self._scheduler.poll(chain), Loading):
            time.sleep(pause_seconds)
        prompt.hit = found
        return found.chunks if found else 0
