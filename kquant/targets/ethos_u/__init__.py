"""Arm Ethos-U55, U65 and U85: their compiler Vela, their rules."""
