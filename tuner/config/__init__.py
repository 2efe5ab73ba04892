"""From a YAML file to a checked `Space`, and from a `Space` to a `Run`. No torch, no Optuna."""
