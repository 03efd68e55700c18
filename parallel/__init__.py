"""Several processes for one command."""
