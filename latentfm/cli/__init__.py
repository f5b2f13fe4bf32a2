"""The command line: `latentfm ...`, one file a command; main.py gathers them."""
