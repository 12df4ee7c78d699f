"""Checkpoint files and folders, atomic writes, and files of other programs."""
