"""Scripts that run other toolkits, each with the Python of an environment of its own."""
