"""The tier in an object store: `s3://`, `az://` (Azure Blob Storage), `gs://` (Google Cloud Storage)."""
