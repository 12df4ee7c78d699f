"""Tools that make a data set ready for training."""
