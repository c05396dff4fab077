"""moe_dist: expert-parallel training of adaptive, multimodal mixture-of-experts transformers."""

__version__ = "0.1.0"
