"""LoRA adapters as programs spell them: read, brought to one form, written on in another."""
