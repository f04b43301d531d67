"""What several folders of tests share: models, graphs, data, and what is done to them."""
