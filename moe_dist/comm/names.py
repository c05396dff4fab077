"""Defines the names of collectives, which appear in events, byte counts and reports of a hang.

The dispatcher `hierarchical` puts `INTER` or `INTRA` before a name. In backward, `BACKWARD` is appended. If tokens are
dispatched in chunks, the number of the chunk comes last.
"""

COUNTS, PAIR_ROWS, EXPERT_IDS = "counts", "pair rows", "expert ids"  # metadata for dispatch plans
DISPATCH_WEIGHTS, DISPATCH_ROWS, COMBINE_ROWS = "dispatch weights", "dispatch rows", "combine rows"
BACKWARD = " backward"
INTER, INTRA = "inter-node ", "intra-node "

CHOICE_LOGITS = "choice logits"  # all-gathered by the expert-choice router
DEPTH_SCORES = "depth scores"  # all-gathered by mixture-of-depths layers

# The training step and evaluation issue these collectives outside of the layers.
LABEL_COUNTS, ROUTING_COUNTS = "label counts", "routing counts"
STEP_SUMS, TRACED_CHOICES = "norm, vote and statistics", "traced choices"
ROUTER_GRADIENTS, EXPERT_GRADIENTS = "router gradients", "expert gradients"
MOVED_EXPERTS, REPLICAS = "moved experts", "weights of replicas"
CALIBRATION_COUNTS, EVALUATION_COUNTS, EVALUATION_SUMS = "calibration counts", "evaluation counts", "evaluation sums"
SAMPLE_ROUTING, SLOWEST_RANK = "routing of samples", "seconds of the slowest rank"
MAPPED_EXPERTS, PLACEMENT_ROWS = "experts of mapped tokens", "rows under other placements"
CHECKSUMS, WEIGHT_SUMS = "checksums of copies", "weights and updates"
