"""Post-training steps that decide weights and biases from data, layer by layer (section 3 of the white paper)."""
