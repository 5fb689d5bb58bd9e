"""Flax Linen modules and pure functions over plain parameter dicts."""
