"""Prints manifests of a run for Kubernetes, and starts the ranks of a pod."""
