"""What files cost, layer by layer, and the search for what fits a budget."""
