"""The transformer, written as if for one device. Only routers and MoE layers issue collectives."""
