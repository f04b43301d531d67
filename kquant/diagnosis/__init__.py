"""Where the accuracy went: figure 9 of the white paper, executed."""
