"""A student that thinks in latent positions: the model, its training, its answers, its checks."""
