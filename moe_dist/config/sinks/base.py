from moe_dist.config.base.section import KindSection


class SinkSection(KindSection):
    """A destination of a run's records, the measured values of each step."""
