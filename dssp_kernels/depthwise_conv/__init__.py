"""A depthwise convolution with the leading ReLU inside: y = conv2d(relu(x), weight, groups=C)."""
