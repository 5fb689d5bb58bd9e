"""A kinematic tabletop in NumPy and PIL: environment, demonstrator and data set."""
