"""Weights in both directions: Hugging Face and upstream checkpoints <-> st4vla_jax."""
