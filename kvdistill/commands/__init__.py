"""The click commands, one file per theme: parse, call a pipeline, print."""
