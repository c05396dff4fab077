"""Imports and exports pretrained models as Hugging Face folders (config.json, safetensors). Does not import
transformers."""
