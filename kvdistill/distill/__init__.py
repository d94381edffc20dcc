"""Stage 2: from the stored shards of several teachers to a student. No teacher is loaded here."""
