"""What a search ends in: chosen, within a budget, then retrained, loaded and exported."""
