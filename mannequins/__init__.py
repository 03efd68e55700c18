"""Drawn pedestrians: the embedded data set, and the true answer to every swap."""
