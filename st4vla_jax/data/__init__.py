"""Data: numpy on the host, no jax, no torch, no TensorFlow."""
