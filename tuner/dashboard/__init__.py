"""optuna-dashboard on this machine: read-only unless asked otherwise, and fast with many trials."""
