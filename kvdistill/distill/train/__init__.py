"""Training: set-up, trainer, checkpoints, guards, callbacks."""
