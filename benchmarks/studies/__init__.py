"""What tools/reproduce.py compares, and how another library trains there."""
