"""Stage 1: reading teachers into the store."""
