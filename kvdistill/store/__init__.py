"""The store: the one contract between the two stages. Plain zarr or safetensors, and JSON."""
