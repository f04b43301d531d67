"""TensorFlow Lite Micro: its interpreter, its arithmetic in numpy, its rules."""
