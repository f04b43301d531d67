"""Writing, reading, executing and checking TFLite files."""
