"""The artifact: packaged, merged, probed for parity, published, exported."""
