"""Reinforcement learning for autoregressive text-to-image models, with spatial credit."""

__version__ = "0.1.0"
