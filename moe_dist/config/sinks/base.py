from moe_dist.config.base.section import KindSection


class SinkSection(KindSection):
    """A destination of a run's records. A record has the measured values of a step."""
