"""The code that an export writes beside the weights of a model that no family of transformers can express."""
