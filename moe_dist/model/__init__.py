"""The transformer, written as for one device: of its parts only routers and MoE layers issue collectives."""
