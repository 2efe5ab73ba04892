"""Hyperparameter search for fine-tuning pretrained models.

YAML and labelled data in, a verified model out.
"""

__version__ = "0.1.0"
