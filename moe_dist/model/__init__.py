"""The transformer is written as for one device. Only routers and MoE layers issue collectives."""
