"""The code that an export puts beside the weights of a model that no family of transformers can express."""
