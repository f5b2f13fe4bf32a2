"""A run on disk: its checkpoints, whether it goes on from them, and its result."""
