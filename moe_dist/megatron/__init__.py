"""The MoE layer as a layer spec for Megatron-Core's GPTModel, and the engine that uses Megatron-Core (docs/megatron.md)."""
