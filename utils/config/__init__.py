"""The configuration: the declaration of every key, and how yaml files and overrides are read."""
