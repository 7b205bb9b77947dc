"""The judge: scores the candidates of a chunk by the criteria of the configuration."""
