"""Data sources. Each file's `load(home, wanted, **keys)` gives a `Data`; its keyword arguments are the YAML keys."""
