"""Studies: what the method is worth, part by part."""
