"""What predict, evaluation and serving share."""
