"""The on-disk format: bit packing, manifest, streaming readers."""
