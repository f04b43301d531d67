"""Grids: sets of allowed integers on a scale, and how they are chosen and trained."""
