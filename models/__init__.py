"""Small reference models with their training recipes."""
