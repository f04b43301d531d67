"""What is simulated is what runs: comparisons of a model with its file."""
