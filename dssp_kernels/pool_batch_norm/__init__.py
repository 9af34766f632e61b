"""A pool and the BatchNorm after it in one operator, without the map between them: batch_norm(max_pool2d(x))."""
