"""How the constants of a file are stored: compressed on the device, or packed for transport."""
