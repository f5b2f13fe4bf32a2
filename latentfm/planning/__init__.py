"""What a run comes to and what it takes, before a weight is read."""
