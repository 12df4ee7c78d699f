"""Studies: what is compared, how it is trained and judged, and the pages made of it."""
