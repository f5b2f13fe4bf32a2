"""What the processes of a run do together, and what each of them holds."""
