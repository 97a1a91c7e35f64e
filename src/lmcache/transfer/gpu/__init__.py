"""Copies between paged KV in GPU memory and extents of the arena.

A copy is cut into *pieces*: a run of planes of one chunk, or several complete chunks where chunks are small. A piece passes
through one place of a staging ring in GPU memory: a Triton kernel gathers tokens from the paged KV into the ring (or scatters
them back), and the copy engine moves the piece between the ring and the arena. The kernel of one piece runs while the
transfer of the piece before it is on PCIe.

`copier` is what an engine's worker uses. `ring` cuts a copy into pieces and launches them, `kernel` is the Triton kernel,
`pinned` registers the arena with the driver, `launch` hands pieces to the driver from C, and `driver` finds the driver.
Only `copier`, `kernel`, `ring` and `pinned` import torch or Triton, and nothing imports them before an engine on a GPU asks.
"""
