"""The click commands, one file per family: parse, call one pipeline, print."""
