"""Command line of kquant: thin absl apps, installed as kquant-<name> and runnable as `python -m tools.<name>`."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported: no start-up notices
