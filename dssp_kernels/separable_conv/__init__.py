"""A depthwise and a pointwise convolution in one pass: y = conv2d(conv2d(relu(x), depthwise, groups=C), pointwise)."""
