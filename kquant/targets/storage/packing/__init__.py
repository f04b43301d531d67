"""A lossless container for .tflite files."""
