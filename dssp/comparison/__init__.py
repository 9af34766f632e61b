"""Methods compared under one budget: a search per method and seed, and what they say together."""
