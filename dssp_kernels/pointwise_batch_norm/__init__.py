"""A pointwise convolution and the BatchNorm after it in one operator, from the ReLU on: batch_norm(conv2d(relu(x)))."""
