"""Stage 2: from stored shards of several teachers to a student. No teacher is ever loaded here."""
