"""Tasks. Each file names its `METRICS`, the first being the default, and gives a `Task` from `build(**keys)`."""
