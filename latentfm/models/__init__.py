"""Networks and encoders, on torch's, diffusers' and transformers' base classes."""
