"""What a person runs beside the three mains."""
