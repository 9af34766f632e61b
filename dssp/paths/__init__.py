"""Hard paths: one candidate per edge, as in a derived cell, run inside the supernet.

space      the paths that are left in a supernet
affordable those whose derived network fits a budget
training   a path drawn for every step; at the end paths are compared and one is chosen
scores     paths scored on held-out images, and the choice between those that tie
effects    what each candidate is worth on the paths it is on
"""
