"""Facts about this node, and the checks of them."""
