"""Export formats. Each file's `save` writes a model and its `load` reads it back as a function of pixels."""
