"""Model families.

Each file names the models that it builds in `NAMES`, and cuts them into stages in `build`.
"""
