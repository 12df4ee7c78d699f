"""View recipes, keyed draws, and their application to batches."""
