"""Measure speed. A module has `add_arguments(parser)` and `run(args)`: figures by name."""
