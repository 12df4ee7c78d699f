"""Everything that makes tensors out of files: sources, recipes, batched augmentation, global loaders."""
