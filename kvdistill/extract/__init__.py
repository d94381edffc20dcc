"""Stage 1: a teacher reads texts, and its keys and values become an encoded shard."""
