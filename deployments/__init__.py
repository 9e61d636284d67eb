"""Serve a compiled PyTorch model with Ray Serve."""

from deployments.outage import ask_early

ask_early()
