"""What `tools/report.py` is made of."""
