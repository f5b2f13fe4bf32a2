"""Training an AutoencoderKL, from nothing or further (notes, section 6.2, Algorithm 6, and its practical remarks)."""
