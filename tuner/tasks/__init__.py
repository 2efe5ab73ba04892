"""Tasks: `METRICS` of each file, the first is the default; `build(**keys)` gives a `Task`."""
