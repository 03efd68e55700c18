"""Data sets on disk: reading, preparing, and batches of training pairs."""
