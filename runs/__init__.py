"""Runs on disk: folders, snapshots, weights, and what goes on around a training step."""
