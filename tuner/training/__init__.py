"""Carries out one `Run`: build, freeze, cache, train, checkpoint, retrain, predict. No Optuna."""
