"""What the project measures of itself: tables, benchmarks and peers; run from the checkout, not installed."""

import kquant_tools  # noqa: F401, first of all: its settings of TensorFlow
