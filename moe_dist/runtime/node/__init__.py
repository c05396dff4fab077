"""Facts about this node, and checks of these facts."""
