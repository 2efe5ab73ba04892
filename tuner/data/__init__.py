"""Data sources: `load(home, input_spec, task, **keys)` of each file gives a `Dataset`.

Its keyword arguments are the YAML keys.
"""
