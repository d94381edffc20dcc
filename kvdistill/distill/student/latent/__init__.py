"""A student that reasons in latent positions: the model, its training, its answers, its probes."""
