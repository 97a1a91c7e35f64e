"""The tier in Redis or Valkey: `redis://` and its kin."""
