"""What pools and skip connections add to the nodes of a cell, for all edges that leave a state in one operator."""
