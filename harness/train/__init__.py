"""Training drafters for a model that has none, from text that the model writes itself."""
