"""The experiment file as frozen, checked data: one module per section."""
