"""Everything that makes tensors out of files."""
