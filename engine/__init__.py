"""How any model trains: loop, optimisers, precision, checkpointing. Knows no method and no data set."""
