"""What moves the trained weights, and their running average."""
