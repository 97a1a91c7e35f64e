"""LMCache: a KV-cache layer for LLM engines.

The folders are floors; a file imports only from floors below its own (ARCHITECTURE.md draws them, and a test enforces them).
"""

__version__ = "0.6.0"
