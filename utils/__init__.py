"""Small things that know nothing of training: configuration, checkpoints, processes, logging."""
