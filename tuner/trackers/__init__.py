"""Where a search is followed beside tuner's own console and dashboard: one file each.

A tracker runs on a thread of the process that owns the study, so its libraries are imported when it
starts. No torch, no Optuna, and no network unless the library's own variables ask for it.
"""
