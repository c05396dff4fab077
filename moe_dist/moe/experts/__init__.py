"""The experts of a layer: FFNs, LoRA experts and zero-computation experts."""
