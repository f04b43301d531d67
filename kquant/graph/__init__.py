"""Networks as immutable graphs of primitive operations."""
