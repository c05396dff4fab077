"""The experts of a layer, and the experts that compute nothing."""
