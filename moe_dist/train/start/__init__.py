"""The state in which a run starts: resumed, or from the weights of another model; and the dry run."""
