"""Benchmarks that need a GPU: copies against PCIe, and real vLLM with and without us."""
