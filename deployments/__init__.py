"""Serve a compiled PyTorch model with Ray Serve."""
