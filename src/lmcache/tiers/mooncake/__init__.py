"""The tier in a Mooncake Store: `mooncake://`. The store's client runs in a process of its own."""
