"""The ablation: what generation brings to re-identification."""
