"""Training: the rooms that know Accelerate."""
