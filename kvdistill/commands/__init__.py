"""The click commands, one file per theme. They parse, call a pipeline and print; nothing else."""
