"""What the tools are made of; `tools/` itself holds what a person runs."""
