"""The automaton in plain PyTorch: the specification every other backend is compared with.

One step of one grid ``s`` of shape [N, C, H, W] (C channels: 0 = value, 1 = alpha, the rest hidden):

    p  = concat(s, sobel_x * s, sobel_y * s, laplacian * s)      # depthwise 3x3, zero padding
    h1 = relu(W1 p + b1 [+ R[n, :, y] + C[n, :, x]])             # 1x1 convolutions; with context
    ds = W3 relu(W2 h1 + b2) + b3
    u  = s + ds  or, with growth,  s + [maxpool3x3(s[:, 1]) > 0] ds
    v  = u with v[:, 1] = clamp(u[:, 1], 0, 1)
    s' = v * maxpool3x3(v[:, 1])                                 # a cell lives if a neighbor does

Context is what a cell is told at every step beside its neighbors, such as its place: a vector for its row, R, and one
for its column, C. With growth a cell in whose 3x3 neighborhood nothing lived before the step does not change, so life
spreads by one cell a step.
"""

import torch
import torch.nn.functional as F

SOBEL_X = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))
SOBEL_Y = ((-1.0, -2.0, -1.0), (0.0, 0.0, 0.0), (1.0, 2.0, 1.0))
LAPLACIAN = ((1.0, 2.0, 1.0), (2.0, -12.0, 2.0), (1.0, 2.0, 1.0))


def why_not(device, dtype, num_channels, precision):
    """None if this backend can run the request, else the reason as a clause."""
    if precision != "fp32":
        return f"it computes in the dtype of its input and knows no precision={precision!r}"
    return None


def perceive(s):
    """[N, C, H, W] -> [N, 4C, H, W]: the state and its three depthwise stencils, grouped by stencil."""
    channels = s.shape[1]
    stencils = torch.tensor((SOBEL_X, SOBEL_Y, LAPLACIAN), dtype=s.dtype, device=s.device)
    parts = [s]
    for stencil in stencils:
        parts.append(F.conv2d(s, stencil.expand(channels, 1, 3, 3), padding=1, groups=channels))
    return torch.cat(parts, dim=1)


def alive(s):
    """[N, C, H, W] -> [N, 1, H, W]: whether anything lives in a cell's 3x3 neighborhood."""
    return F.max_pool2d(s[:, 1:2], kernel_size=3, stride=1, padding=1) > 0


def step(s, weights, life_mask=True, context=None, growth=False):
    """One step of one grid.

    ``weights`` is (w1, b1, w2, b2, w3, b3), the w's as 1x1 convolution kernels [out, in, 1, 1].
    ``life_mask=False`` leaves out the clamp and the mask: the rule the notebook really ran.
    ``context`` is (R [N or 1, 128, H], C [N or 1, 128, W]).
    """
    w1, b1, w2, b2, w3, b3 = weights
    h = F.conv2d(perceive(s), w1, b1)
    if context is not None:
        rows, columns = context
        h = h + rows[:, :, :, None] + columns[:, :, None, :]
    h = F.relu(F.conv2d(F.relu(h), w2, b2))
    ds = F.conv2d(h, w3, b3)
    u = s + (torch.where(alive(s), ds, 0.0) if growth else ds)
    if not life_mask:
        return u
    v = torch.cat([u[:, :1], u[:, 1:2].clamp(0.0, 1.0), u[:, 2:]], dim=1)
    return v * F.max_pool2d(v[:, 1:2], kernel_size=3, stride=1, padding=1)


def rollout(s, weights, num_steps, life_mask=True, context=None, growth=False):
    """``num_steps`` steps of one grid, differentiable step by step."""
    for _ in range(num_steps):
        s = step(s, weights, life_mask, context, growth)
    return s
