"""The student: loading, LoRA, KV injection, latent reasoning."""
