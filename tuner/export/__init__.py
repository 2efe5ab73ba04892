"""Export formats: `save` of each file writes a model, `load` reads it back as a function."""
