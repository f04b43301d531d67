"""Command line of kquant: thin absl apps, installed as kquant-<name>; `python -m kquant_tools.<name>` runs them too."""

import os
import sys

from kquant_tools.quiet import QuietImport

# before TensorFlow is imported: no start-up notices, and oneDNN, which it leaves out by itself on AMD's processors,
# where a training step then takes twice the time and the memory
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
if "tensorflow" not in sys.modules:
    sys.meta_path.insert(0, QuietImport("tensorflow"))
