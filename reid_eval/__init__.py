"""Re-identification evaluation: features, ranking, re-ranking and the report of both conventions."""
