"""The tier in an object store: `s3://`."""
