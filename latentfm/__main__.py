"""`python -m latentfm`, which `accelerate launch -m latentfm` needs; the same as the `latentfm` command."""

from latentfm.cli.main import main

main()
