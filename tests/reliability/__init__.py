"""Reliability, counted: the driver of the long run and the rows of its page."""
