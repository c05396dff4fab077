"""The transformer, written as for one device: only routers and MoE layers issue collectives."""
