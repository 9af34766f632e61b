"""What leaves the supernet: edges, candidates, and the held-out images that decide it."""
