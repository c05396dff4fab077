"""Pretrained models in and out: Hugging Face's folders of config.json and safetensors. Imports no transformers."""
