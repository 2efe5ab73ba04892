"""Where jobs are carried out.

Each file's `run` takes jobs from the coordinator and knows nothing of training.
"""
