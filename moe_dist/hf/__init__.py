"""Imports and exports pretrained models as Hugging Face folders (config.json, safetensors) without using transformers. The
package `ep` runs transformers' own models on several ranks."""
