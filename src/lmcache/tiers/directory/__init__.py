"""The tier in a directory that several servers share: `dir://`."""
