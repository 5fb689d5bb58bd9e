"""Evaluation: answers parsed and scored."""
