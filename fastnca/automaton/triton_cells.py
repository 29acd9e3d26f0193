"""Where the cells of a tile are, and what they and their neighbors hold: for the Triton kernels in triton_kernels.py.

In all functions `y`, `x` and `local` are those of a tile's cells, as `locate` returns them.
"""

import triton
import triton.language as tl

from . import rule

CHANNELS = tl.constexpr(rule.CHANNELS)
ALPHA = tl.constexpr(rule.ALPHA)
NAN = tl.constexpr(tl.PropagateNan.ALL)
NO_CELL = tl.constexpr(-8)


@triton.jit
def count_tiles(batch, height, width, TILE_HEIGHT: tl.constexpr, TILE_WIDTH: tl.constexpr):
    return batch * tl.cdiv(height, TILE_HEIGHT) * tl.cdiv(width, TILE_WIDTH)


@triton.jit
def locate(
    tile,
    batch,
    mel_height,
    mel_width,
    linear_height,
    linear_width,
    TILE_HEIGHT: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
):
    """-> whether the tile is of linear, its sample, its first cell in the state, this cell's row and column, the height
    and width of its grid, and for each of its cells the row, the column and the place relative to the first cell.

    A cell outside the grid gets the row NO_CELL, which is so far outside that no neighbor is in the grid either."""
    mel_tiles = count_tiles(batch, mel_height, mel_width, TILE_HEIGHT, TILE_WIDTH)
    is_linear = tile >= mel_tiles
    height = tl.where(is_linear, linear_height, mel_height)
    width = tl.where(is_linear, linear_width, mel_width)
    before = tl.where(is_linear, mel_height.to(tl.int64) * mel_width * batch, 0)
    tile = tl.where(is_linear, tile - mel_tiles, tile)
    across = tl.cdiv(width, TILE_WIDTH)
    down = tl.cdiv(height, TILE_HEIGHT)
    sample = tile // (down * across)
    y0 = tile // across % down * TILE_HEIGHT
    x0 = tile % across * TILE_WIDTH
    first = before + (sample.to(tl.int64) * height + y0) * width + x0
    index = tl.arange(0, TILE_HEIGHT * TILE_WIDTH)
    y = y0 + index // TILE_WIDTH
    x = x0 + index % TILE_WIDTH
    local = index // TILE_WIDTH * width + index % TILE_WIDTH
    y = tl.where((y < height) & (x < width), y, NO_CELL)
    return is_linear, sample.to(tl.int64), first, y0, x0, height, width, y, x, local


@triton.jit
def count_cells(batch, mel_height, mel_width, linear_height, linear_width):
    return (mel_height.to(tl.int64) * mel_width + linear_height.to(tl.int64) * linear_width) * batch


@triton.jit
def in_grid(y, x, height, width):
    return (y >= 0) & (y < height) & (x >= 0) & (x < width)


@triton.jit
def load_values(rows, y, x, local, height, width, dy: tl.constexpr, dx: tl.constexpr):
    """[cells, 16]: the neighbors' values, zero outside the grid. `rows` points to the tile's first cell."""
    offset = (local + (dy * width + dx)) * CHANNELS
    inside = in_grid(y + dy, x + dx, height, width)
    return tl.load(rows + offset[:, None] + tl.arange(0, CHANNELS)[None, :], mask=inside[:, None], other=0.0)


@triton.jit
def load_scalar(plane, y, x, local, height, width, dy: tl.constexpr, dx: tl.constexpr):
    """[cells]: the neighbors' numbers in a plane, zero outside the grid."""
    return tl.load(plane + local + (dy * width + dx), mask=in_grid(y + dy, x + dx, height, width), other=0.0)


@triton.jit
def find_alive(values, y, x, local, height, width):
    """[cells]: whether anything lives in the 3x3 window, of a state that is read without a life mask."""
    largest = tl.zeros(y.shape, tl.float32)
    for k in tl.static_range(9):
        offset = (local + ((k // 3 - 1) * width + k % 3 - 1)) * CHANNELS + ALPHA
        inside = in_grid(y + (k // 3 - 1), x + (k % 3 - 1), height, width)
        largest = tl.maximum(largest, tl.load(values + offset, mask=inside, other=0.0), propagate_nan=NAN)
    return largest > 0.0


@triton.jit
def clamped(alpha):
    return tl.clamp(alpha, 0.0, 1.0, propagate_nan=NAN)


@triton.jit
def _maximum(a, b, c):
    return tl.maximum(tl.maximum(a, b, propagate_nan=NAN), c, propagate_nan=NAN)


@triton.jit
def life_of(left, middle, right):
    """The life of the window that these three columns' maxima make up."""
    return clamped(_maximum(left, middle, right))


@triton.jit
def vertical_maxima(alpha, y, x, local, height, width, dx: tl.constexpr):
    """The maxima of alpha over three cells above one another in the column dx, around the rows -1, 0 and 1.

    Alpha is not clamped here: a clamp of the whole window's maximum gives the same life. Cells outside the grid count
    as zero, which changes no life, because the clamp makes every life at least zero."""
    a0 = load_scalar(alpha, y, x, local, height, width, -2, dx)
    a1 = load_scalar(alpha, y, x, local, height, width, -1, dx)
    a2 = load_scalar(alpha, y, x, local, height, width, 0, dx)
    a3 = load_scalar(alpha, y, x, local, height, width, 1, dx)
    a4 = load_scalar(alpha, y, x, local, height, width, 2, dx)
    return _maximum(a0, a1, a2), _maximum(a1, a2, a3), _maximum(a2, a3, a4)


@triton.jit
def load_three(plane, y, x, local, height, width, dx: tl.constexpr):
    """The numbers of a plane in the rows -1, 0 and 1 of the column dx."""
    above = load_scalar(plane, y, x, local, height, width, -1, dx)
    middle = load_scalar(plane, y, x, local, height, width, 0, dx)
    return above, middle, load_scalar(plane, y, x, local, height, width, 1, dx)


@triton.jit
def find_life(alpha, y, x, local, height, width):
    """[cells]: maximum of the clamped alpha over the 3x3 window."""
    _, left, _ = vertical_maxima(alpha, y, x, local, height, width, -1)
    _, middle, _ = vertical_maxima(alpha, y, x, local, height, width, 0)
    _, right, _ = vertical_maxima(alpha, y, x, local, height, width, 1)
    return life_of(left, middle, right)
