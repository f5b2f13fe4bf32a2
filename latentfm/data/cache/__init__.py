"""What was encoded once, kept: shards of entries by the hash of all they depend on, which many processes fill and read."""
