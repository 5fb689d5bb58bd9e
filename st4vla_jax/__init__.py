"""st4vla_jax: spatially guided vision-language-action policies in JAX, at TPU scale."""

__version__ = "0.1.0"
