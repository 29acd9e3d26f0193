"""The sizes of the rule: how many numbers a cell holds, and the shapes of the network that every cell runs.

reference.py says what is computed with them. The C++ kernels have the same sizes in csrc/fastnca.h.
"""

VALUE, ALPHA = 0, 1  # channels of a cell; all others are hidden
CHANNELS = 16
STENCILS = 4  # a cell perceives itself, its two Sobel gradients and its Laplacian
HIDDEN1 = 128
HIDDEN2 = 64
WEIGHT_NAMES = ("w1", "b1", "w2", "b2", "w3", "b3")
CONTEXT_NAMES = ("mel_rows", "linear_rows", "columns")


def perception(num_channels=CHANNELS):
    """How many numbers a cell perceives: 64 for 16 channels."""
    return STENCILS * num_channels


def weight_shapes(num_channels=CHANNELS):
    """The shapes of (w1, b1, w2, b2, w3, b3), the w's as 1x1 convolution kernels [out, in, 1, 1]."""
    return (
        (HIDDEN1, perception(num_channels), 1, 1),
        (HIDDEN1,),
        (HIDDEN2, HIDDEN1, 1, 1),
        (HIDDEN2,),
        (num_channels, HIDDEN2, 1, 1),
        (num_channels,),
    )


def saved_steps(num_steps, save_every):
    """The steps whose states a rollout saves for its backward pass: 0, save_every, 2 save_every, ... and the last."""
    return (*range(0, num_steps, save_every), num_steps)
