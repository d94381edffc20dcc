"""The experiment file as frozen, validated data: one module per group of sections."""
