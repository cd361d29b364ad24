"""Text: as rows of tokens, written by the base model, and passed through a model."""
