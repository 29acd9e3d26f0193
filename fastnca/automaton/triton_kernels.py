"""The Triton kernels. Only triton.py imports this module, at its first launch: it imports Triton.

A state is one row of floats: the 16 values of every cell, all cells of mel before those of linear. With the life mask
two planes follow, with one float for every cell. The values are what a step computed, with alpha clamped to [0, 1]. The
life mask is not in them: it is applied when they are read (`MASKED`; the initial state has none), so that a step needs
no second pass over its neighbors. The first plane is alpha before the clamp. It makes the 25 reads of a cell's
surroundings contiguous, and the backward pass needs it to know where the clamp passes a gradient. The second plane is
the life mask, which the step that reads the state leaves there for the backward pass.

A gradient is a row of the same form. Its values are the gradient of the state times the life mask, its first plane is
the gradient of every cell's life, and its second plane says which windows the cell's alpha has won (see `_wins`).

A program works on tiles of TILE_HEIGHT x TILE_WIDTH cells. A tile lies in one sample of one grid.

The context, None without one, has for each sample the rows of mel, the rows of linear and the columns: 128 numbers for
each of these places. Where products round it has them as the sum of two terms, the first rounded to bf16, and a product
with zeros and ones tells every cell those of its row and its column. In fp32 the cells load them. The backward pass
adds up their gradient for each row and column of a tile by a product with zeros and ones, too.
"""

import math

import triton
import triton.language as tl

from . import rule
from .triton_cells import (
    ALPHA,
    CHANNELS,
    NAN,
    clamped,
    count_cells,
    count_tiles,
    find_alive,
    find_life,
    in_grid,
    life_of,
    load_scalar,
    load_three,
    load_values,
    locate,
    vertical_maxima,
)

# In registers, and in the packed first layer, the perception of a cell is [16][4]: joining the four parts of a channel
# gives this order without moving data. A gradient of the perception is stored as [cell][4][16].
PERCEPTION = tl.constexpr(rule.perception())
HIDDEN1 = tl.constexpr(rule.HIDDEN1)
HIDDEN2 = tl.constexpr(rule.HIDDEN2)

# Offsets of the layers in the packed weights and in the gradient of a group: first w1, w2 and w3, all [in, out], then
# the biases.
_w1, _b1, _w2, _b2, _w3, _b3 = (math.prod(shape) for shape in rule.weight_shapes())
W2 = tl.constexpr(_w1)
W3 = tl.constexpr(_w1 + _w2)
B1 = tl.constexpr(_w1 + _w2 + _w3)
B2 = tl.constexpr(_w1 + _w2 + _w3 + _b1)
B3 = tl.constexpr(_w1 + _w2 + _w3 + _b1 + _b2)
PARAMETERS = tl.constexpr(_w1 + _w2 + _w3 + _b1 + _b2 + _b3)

# Nothing is specialized on these numbers, nor on the alignment of these tensors, which come from outside. So the
# configuration alone decides which binaries exist, and a grid of another size needs no new one.
SIZES = ["batch", "mel_height", "mel_width", "linear_height", "linear_width"]
CALLERS_TENSORS = ["mel", "linear"]


@triton.jit
def _column(values, y, x, local, height, width, dx: tl.constexpr, upper, middle, lower):
    """The three cells of the 3x3 window in the column dx, as the step sees them -> smoothed vertically, differentiated
    vertically, and the middle one.

    The product with a filter's zero is computed as well: like a convolution in PyTorch it turns infinity into NaN."""
    above = load_values(values, y, x, local, height, width, -1, dx)
    center = load_values(values, y, x, local, height, width, 0, dx)
    below = load_values(values, y, x, local, height, width, 1, dx)
    # The window around a cell outside the grid can reach into the grid and be alive, but such a cell is zero all the
    # same. Without a life mask this is a product with one, which keeps the compiler from loading every cell once for
    # each thread that needs it.
    above *= tl.where(in_grid(y - 1, x + dx, height, width), upper, 0.0)[:, None]
    center *= tl.where(in_grid(y, x + dx, height, width), middle, 0.0)[:, None]
    below *= tl.where(in_grid(y + 1, x + dx, height, width), lower, 0.0)[:, None]
    return above + 2.0 * center + below, below - above + 0.0 * center, center


@triton.jit
def _perceive(values, alpha, life, y, x, local, height, width, MASKED: tl.constexpr, LIFE_KNOWN: tl.constexpr):
    """-> the state that the step sees [cells, 16], the perception [cells, 64] in the order [16][4], and the cells' life
    [cells]."""
    l0, l1, l2, c0, c1, c2, r0, r1, r2 = 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0
    if MASKED and LIFE_KNOWN:
        l0, l1, l2 = load_three(life, y, x, local, height, width, -1)
        c0, c1, c2 = load_three(life, y, x, local, height, width, 0)
        r0, r1, r2 = load_three(life, y, x, local, height, width, 1)
    elif MASKED:
        p0, p1, p2 = vertical_maxima(alpha, y, x, local, height, width, -2)
        q0, q1, q2 = vertical_maxima(alpha, y, x, local, height, width, -1)
        s0, s1, s2 = vertical_maxima(alpha, y, x, local, height, width, 0)
        t0, t1, t2 = vertical_maxima(alpha, y, x, local, height, width, 1)
        u0, u1, u2 = vertical_maxima(alpha, y, x, local, height, width, 2)
        l0, l1, l2 = life_of(p0, q0, s0), life_of(p1, q1, s1), life_of(p2, q2, s2)
        c0, c1, c2 = life_of(q0, s0, t0), life_of(q1, s1, t1), life_of(q2, s2, t2)
        r0, r1, r2 = life_of(s0, t0, u0), life_of(s1, t1, u1), life_of(s2, t2, u2)
    smooth_left, slope_left, _ = _column(values, y, x, local, height, width, -1, l0, l1, l2)
    smooth, slope, state = _column(values, y, x, local, height, width, 0, c0, c1, c2)
    smooth_right, slope_right, _ = _column(values, y, x, local, height, width, 1, r0, r1, r2)
    sobel_x = smooth_right - smooth_left + 0.0 * smooth
    sobel_y = slope_left + 2.0 * slope + slope_right
    laplacian = smooth_left + 2.0 * smooth + smooth_right - 16.0 * state
    parts = tl.join(tl.join(state, sobel_y), tl.join(sobel_x, laplacian))
    return state, tl.reshape(parts, (state.shape[0], PERCEPTION)), c1


@triton.jit
def _rounded(x):
    """The nearest bf16 number, as float32; the interpreter's own conversion truncates."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _dot(a, b, sum, DOT: tl.constexpr):
    """sum + a @ b. `DOT` names the precision; "bf16 in fp32" is for the interpreter, which has no bf16 products."""
    if DOT == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), sum)
    elif DOT == "bf16 in fp32":
        return tl.dot(_rounded(a), _rounded(b), sum, input_precision="ieee")
    else:
        return tl.dot(a, b, sum, input_precision=DOT)


@triton.jit
def _relu(x):
    return tl.maximum(x, 0.0, propagate_nan=NAN)


@triton.jit
def _matrix(weights, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.load(weights + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def _first_layers(weights, CHUNK: tl.constexpr):
    """-> w1 and w2: the matrices themselves where a program keeps them, else where they are in memory."""
    if CHUNK == HIDDEN1:
        return _matrix(weights, PERCEPTION, HIDDEN1), _matrix(weights + W2, HIDDEN1, HIDDEN2)
    else:
        return weights, weights + W2


@triton.jit
def _places(unit):
    """Where the weights of some units of the first hidden layer are in w1 and in w2."""
    in_w1 = tl.arange(0, PERCEPTION)[:, None] * HIDDEN1 + unit[None, :]
    return in_w1, unit[:, None] * HIDDEN2 + tl.arange(0, HIDDEN2)[None, :]


@triton.jit
def _is_at(cell, place, TILE_WIDTH: tl.constexpr, SIDE: tl.constexpr):
    """One where a cell of a tile is at a place, else zero: places 0 to SIDE - 1 are the tile's rows, then its columns
    follow, and then, for the second term of the context, the same again."""
    place %= 2 * SIDE
    return tl.where(place < SIDE, cell // TILE_WIDTH == place, cell % TILE_WIDTH == place - SIDE).to(tl.float32)


@triton.jit
def _places_of(
    context,
    is_linear,
    sample,
    y0,
    x0,
    height,
    width,
    mel_height,
    linear_height,
    TILE_HEIGHT: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    DOT: tl.constexpr,
):
    """-> which cells of a tile are at which places [cells, places], and where in memory the places' context begins; in
    fp32, where in memory that of each cell's row begins and that of its column. A place outside the grid has that of
    the last place in it: no cell in the grid is there."""
    first = context + sample * (mel_height + linear_height + width) * HIDDEN1 * (1 if DOT == "ieee" else 2)
    rows = tl.where(is_linear, mel_height, 0)
    columns = mel_height + linear_height
    if DOT == "ieee":
        cell = tl.arange(0, TILE_HEIGHT * TILE_WIDTH)
        row = tl.minimum(y0 + cell // TILE_WIDTH, height - 1) + rows
        column = tl.minimum(x0 + cell % TILE_WIDTH, width - 1) + columns
        return first + row * HIDDEN1, first + column * HIDDEN1
    else:
        SIDE: tl.constexpr = max(8, TILE_HEIGHT, TILE_WIDTH)
        place = tl.arange(0, 4 * SIDE)
        is_at = _is_at(tl.arange(0, TILE_HEIGHT * TILE_WIDTH)[:, None], place[None, :], TILE_WIDTH, SIDE)
        row = tl.minimum(y0 + place % SIDE, height - 1) + rows
        column = tl.minimum(x0 + place % SIDE, width - 1) + columns
        number = tl.where(place % (2 * SIDE) < SIDE, row, column)
        return is_at, first + (number * 2 + place // (2 * SIDE)) * HIDDEN1


@triton.jit
def _units(p, w1, biases, is_at, places, unit, DOT: tl.constexpr):
    """[cells, units]: some units of the first hidden layer, of the perception p and, unless `places` is None, of the
    context. w1 has their weights alone."""
    b1 = tl.load(biases + unit)
    sum = tl.zeros((p.shape[0], w1.shape[1]), tl.float32) + b1[None, :]
    sum = _dot(p, w1, sum, DOT)
    if places is not None:
        told = tl.load(places[:, None] + unit[None, :])
        if DOT == "ieee":
            sum += told + tl.load(is_at[:, None] + unit[None, :])
        else:
            sum = _dot(is_at, told, sum, DOT)
    return _relu(sum)


@triton.jit
def _hidden(p, w1, w2, biases, is_at, places, CHUNK: tl.constexpr, DOT: tl.constexpr):
    """Both hidden layers of the perception p and the context -> p, the first layer where it is not computed in slices,
    the second. w1 and w2 are what `_first_layers` returns."""
    b2 = tl.load(biases + HIDDEN1 + tl.arange(0, HIDDEN2))
    h2 = tl.zeros((p.shape[0], HIDDEN2), tl.float32) + b2[None, :]
    if CHUNK == HIDDEN1:
        h1 = _units(p, w1, biases, is_at, places, tl.arange(0, HIDDEN1), DOT)
        return p, h1, _relu(_dot(h1, w2, h2, DOT))
    else:
        for j in range(0, HIDDEN1, CHUNK):
            if DOT == "tf32":
                p += 0.0  # or the copies of it as an operand would be held in registers throughout the loop
            unit = j + tl.arange(0, CHUNK)
            in_w1, in_w2 = _places(unit)
            w1_units, w2_units = tl.load(w1 + in_w1), tl.load(w2 + in_w2)
            h2 = _dot(_units(p, w1_units, biases, is_at, places, unit, DOT), w2_units, h2, DOT)
        return p, p, _relu(h2)


@triton.jit
def _grows(values, life, y, x, local, height, width, MASKED: tl.constexpr):
    """[cells]: whether anything lives in the 3x3 window of the state that the step sees. Read through the life mask
    (`MASKED`) something does wherever the mask is not zero: the largest alpha of the window lives itself."""
    if MASKED:
        return life > 0.0
    else:
        return find_alive(values, y, x, local, height, width)


@triton.jit(do_not_specialize=SIZES)
def step(
    state_from,
    state_to,
    weights,
    biases,
    context,
    batch,
    mel_height,
    mel_width,
    linear_height,
    linear_width,
    MASKED: tl.constexpr,
    LIFE_MASK: tl.constexpr,
    GROWTH: tl.constexpr,
    TILE_HEIGHT: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    DOT: tl.constexpr,
):
    """One step of both grids: the state `state_to` from `state_from`, in which it leaves the life mask."""
    CELLS: tl.constexpr = TILE_HEIGHT * TILE_WIDTH
    cells = count_cells(batch, mel_height, mel_width, linear_height, linear_width)
    tiles = count_tiles(batch, mel_height, mel_width, TILE_HEIGHT, TILE_WIDTH)
    tiles += count_tiles(batch, linear_height, linear_width, TILE_HEIGHT, TILE_WIDTH)
    channel = tl.arange(0, CHANNELS)
    w1, w2 = _first_layers(weights, CHUNK)
    w3 = _matrix(weights + W3, HIDDEN2, CHANNELS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        is_linear, sample, first, y0, x0, height, width, y, x, local = locate(
            tile, batch, mel_height, mel_width, linear_height, linear_width, TILE_HEIGHT, TILE_WIDTH
        )
        values = state_from + first * CHANNELS
        alpha = state_from + cells * CHANNELS + first
        state, p, life = _perceive(values, alpha, alpha, y, x, local, height, width, MASKED, False)
        exists = y >= 0
        if MASKED:
            tl.store(alpha + cells + local, life, mask=exists)
            if GROWTH:
                # Where it is needed it is loaded again: kept in registers until then, it took the place of operands.
                tl.debug_barrier()
        is_at, places = None, None
        if context is not None:
            corner = is_linear, sample, y0, x0, height, width
            is_at, places = _places_of(context, *corner, mel_height, linear_height, TILE_HEIGHT, TILE_WIDTH, DOT)
        _, _, h2 = _hidden(p, w1, w2, biases, is_at, places, CHUNK, DOT)
        b3 = tl.load(biases + HIDDEN1 + HIDDEN2 + channel)
        change = _dot(h2, w3, tl.zeros((CELLS, CHANNELS), tl.float32) + b3[None, :], DOT)
        if GROWTH:
            if MASKED:
                life = tl.load(alpha + cells + local, mask=exists, other=0.0)
            change = tl.where(_grows(values, life, y, x, local, height, width, MASKED)[:, None], change, 0.0)
        u = state + change
        where = state_to + first * CHANNELS + (local * CHANNELS)[:, None] + channel[None, :]
        if LIFE_MASK:
            is_alpha = (channel == ALPHA)[None, :]
            tl.store(where, tl.where(is_alpha, clamped(u), u), mask=exists[:, None])
            plane = state_to + cells * CHANNELS + first + local
            tl.store(plane[:, None] + tl.zeros((1, CHANNELS), tl.int32), u, mask=exists[:, None] & is_alpha)
        else:
            tl.store(where, u, mask=exists[:, None])


@triton.jit
def _beaten(alpha, own, y, x, local, height, width, dy: tl.constexpr, dx: tl.constexpr):
    """Whether the cell's own clamped alpha goes before the neighbor's where a window has both: the first maximum in
    row-major order wins, and a NaN beats everything before it."""
    near = clamped(load_scalar(alpha, y, x, local, height, width, dy, dx))
    if dy < 0 or (dy == 0 and dx < 0):
        beaten = (own > near) | (own != own)
    else:
        beaten = (near <= own) | ((own != own) & (near == near))
    return beaten | (in_grid(y + dy, x + dx, height, width) == 0)


@triton.jit
def _vertical_wins(alpha, own, y, x, local, height, width, dx: tl.constexpr):
    """Whether the cell beats three cells above one another, in the column dx: around the rows -1, 0 and 1."""
    a0 = _beaten(alpha, own, y, x, local, height, width, -2, dx)
    a1 = _beaten(alpha, own, y, x, local, height, width, -1, dx)
    a3 = _beaten(alpha, own, y, x, local, height, width, 1, dx)
    a4 = _beaten(alpha, own, y, x, local, height, width, 2, dx)
    if dx == 0:
        return a0 & a1, a1 & a3, a3 & a4
    else:
        a2 = _beaten(alpha, own, y, x, local, height, width, 0, dx)
        return a0 & a1 & a2, a1 & a2 & a3, a2 & a3 & a4


@triton.jit
def _wins(alpha, y, x, local, height, width):
    """[cells], a whole number: bit k says that the cell's alpha is the first maximum of the window around its k-th
    neighbor, and bit 9 that the clamp passes the gradient."""
    raw = load_scalar(alpha, y, x, local, height, width, 0, 0)
    own = clamped(raw)
    p0, p1, p2 = _vertical_wins(alpha, own, y, x, local, height, width, -2)
    q0, q1, q2 = _vertical_wins(alpha, own, y, x, local, height, width, -1)
    s0, s1, s2 = _vertical_wins(alpha, own, y, x, local, height, width, 0)
    t0, t1, t2 = _vertical_wins(alpha, own, y, x, local, height, width, 1)
    u0, u1, u2 = _vertical_wins(alpha, own, y, x, local, height, width, 2)
    wins = ((raw >= 0.0) & (raw <= 1.0)).to(tl.int32) << 9
    wins |= (p0 & q0 & s0).to(tl.int32) | (q0 & s0 & t0).to(tl.int32) << 1 | (s0 & t0 & u0).to(tl.int32) << 2
    wins |= (p1 & q1 & s1).to(tl.int32) << 3 | (q1 & s1 & t1).to(tl.int32) << 4 | (s1 & t1 & u1).to(tl.int32) << 5
    wins |= (p2 & q2 & s2).to(tl.int32) << 6 | (q2 & s2 & t2).to(tl.int32) << 7 | (s2 & t2 & u2).to(tl.int32) << 8
    return wins.to(tl.float32)


@triton.jit
def _store_row(rows, state, gradient, first, cells, y, x, local, height, width, MASKED: tl.constexpr):
    """Stores the gradient of a state that was read through the life mask (`MASKED`) as the row that the step before it
    needs, else the gradient itself."""
    exists = y >= 0
    where = first * CHANNELS + (local * CHANNELS)[:, None] + tl.arange(0, CHANNELS)[None, :]
    if MASKED:
        plane = first + cells * CHANNELS
        values = tl.load(state + where, mask=exists[:, None], other=0.0)
        tl.store(rows + plane + local, tl.sum(values * gradient, 1), mask=exists)
        wins = _wins(state + plane, y, x, local, height, width)
        tl.store(rows + plane + cells + local, wins, mask=exists)
        gradient *= load_scalar(state + plane + cells, y, x, local, height, width, 0, 0)[:, None]
    tl.store(rows + where, gradient, mask=exists[:, None])


@triton.jit
def _delta(gradient, first, cells, y, x, local, height, width, LIFE_MASK: tl.constexpr):
    """[cells, 16]: the gradient of what a step computed, before the clamp."""
    delta = load_values(gradient + first * CHANNELS, y, x, local, height, width, 0, 0)
    if LIFE_MASK:
        life_gradient = gradient + cells * CHANNELS + first
        wins = load_scalar(life_gradient + cells, y, x, local, height, width, 0, 0).to(tl.int32)
        won = tl.zeros(y.shape, tl.float32)
        for k in tl.static_range(9):
            near = load_scalar(life_gradient, y, x, local, height, width, k // 3 - 1, k % 3 - 1)
            won += tl.where((wins >> k & 1) != 0, near, 0.0)
        passes = (wins >> 9 & 1) != 0
        is_alpha = (tl.arange(0, CHANNELS) == ALPHA)[None, :]
        delta = tl.where(is_alpha, tl.where(passes[:, None], delta + won[:, None], 0.0), delta)
    return delta


@triton.jit
def _transposed(x, DOT: tl.constexpr):
    """x^T as the left operand of a product. The sum changes no number, but keeps the compiler from transposing in
    shared memory: for sm_100 it fails to do so in tf32 ("Illegal shared layout", Triton 3.9)."""
    return tl.trans(x) + 0.0 if DOT == "tf32" else tl.trans(x)


@triton.jit
def _gate(relu, gradient):
    return tl.where(relu <= 0.0, 0.0, gradient)


@triton.jit
def _add(sums, values):
    tl.store(sums, tl.load(sums) + values)


@triton.jit
def _add_matrix(sums, values, COLUMNS: tl.constexpr):
    rows = tl.arange(0, values.shape[0])[:, None]
    _add(sums + rows * COLUMNS + tl.arange(0, values.shape[1])[None, :], values)


@triton.jit
def _add_first_bias(
    sums, places_sums, dh1, unit, TILE_HEIGHT: tl.constexpr, TILE_WIDTH: tl.constexpr, DOT: tl.constexpr
):
    """Adds up the gradient of the first layer's sums, for each of the tile's places or, without context, for b1: with
    context the gradient of b1 is the sum of that of all rows."""
    if places_sums is None:
        _add(sums + B1 + unit, tl.sum(dh1, 0))
    else:
        SIDE: tl.constexpr = max(8, TILE_HEIGHT, TILE_WIDTH)
        place = tl.arange(0, 2 * SIDE)
        is_at = _is_at(tl.arange(0, TILE_HEIGHT * TILE_WIDTH)[None, :], place[:, None], TILE_WIDTH, SIDE)
        part = _dot(is_at, dh1, tl.zeros((2 * SIDE, dh1.shape[1]), tl.float32), DOT)
        number = tl.where(place < SIDE, place, place - SIDE + TILE_HEIGHT)
        exists = tl.where(place < SIDE, place < TILE_HEIGHT, place - SIDE < TILE_WIDTH)
        where = places_sums + number[:, None] * HIDDEN1 + unit[None, :]
        before = tl.load(where, mask=exists[:, None], other=0.0)
        tl.store(where, before + part, mask=exists[:, None])


@triton.jit(do_not_specialize=SIZES)
def network_backward(
    state_from,
    gradient_to,
    gradient_perception,
    gradient_groups,
    gradient_places,
    weights,
    biases,
    context,
    batch,
    mel_height,
    mel_width,
    linear_height,
    linear_width,
    MASKED: tl.constexpr,
    LIFE_MASK: tl.constexpr,
    GROWTH: tl.constexpr,
    TILE_HEIGHT: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    DOT: tl.constexpr,
):
    """From the gradient of the state that a step led to, back to the perception of the state that it came from; what
    reaches that state past the network is in the first of the four parts. Adds to the program's own row of
    `gradient_groups`, so that the number of programs and nothing else decides in which order weight gradients add up.
    """
    CELLS: tl.constexpr = TILE_HEIGHT * TILE_WIDTH
    cells = count_cells(batch, mel_height, mel_width, linear_height, linear_width)
    tiles = count_tiles(batch, mel_height, mel_width, TILE_HEIGHT, TILE_WIDTH)
    tiles += count_tiles(batch, linear_height, linear_width, TILE_HEIGHT, TILE_WIDTH)
    channel = tl.arange(0, CHANNELS)
    sums = gradient_groups + tl.program_id(0).to(tl.int64) * PARAMETERS
    back = weights + B1
    w1, w2 = _first_layers(weights, CHUNK)
    if CHUNK == HIDDEN1:
        w1_back = _matrix(back, HIDDEN1, PERCEPTION)
        w2_back = _matrix(back + W2, HIDDEN2, HIDDEN1)
        dw1 = tl.zeros((PERCEPTION, HIDDEN1), tl.float32)
        dw2 = tl.zeros((HIDDEN1, HIDDEN2), tl.float32)
    dw3 = tl.zeros((HIDDEN2, CHANNELS), tl.float32)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        is_linear, sample, first, y0, x0, height, width, y, x, local = locate(
            tile, batch, mel_height, mel_width, linear_height, linear_width, TILE_HEIGHT, TILE_WIDTH
        )
        is_at, places = None, None
        if context is not None:
            corner = is_linear, sample, y0, x0, height, width
            is_at, places = _places_of(context, *corner, mel_height, linear_height, TILE_HEIGHT, TILE_WIDTH, DOT)
        values = state_from + first * CHANNELS
        life = state_from + cells * (CHANNELS + 1) + first
        _, p, own_life = _perceive(values, life, life, y, x, local, height, width, MASKED, True)
        d_kept = _delta(gradient_to, first, cells, y, x, local, height, width, LIFE_MASK)
        delta = d_kept
        if GROWTH:
            delta = tl.where(_grows(values, own_life, y, x, local, height, width, MASKED)[:, None], delta, 0.0)
        places_sums = None
        if context is not None:
            places_sums = gradient_places + tl.cast(tile, tl.int64) * ((TILE_HEIGHT + TILE_WIDTH) * HIDDEN1)
        dp = tl.zeros((CELLS, PERCEPTION), tl.float32)
        p, h1, h2 = _hidden(p, w1, w2, biases, is_at, places, CHUNK, DOT)
        dw3 = _dot(_transposed(h2, DOT), delta, dw3, DOT)
        _add(sums + B3 + channel, tl.sum(delta, 0))
        w3_back = _matrix(back + W3, CHANNELS, HIDDEN2)
        dh2 = _gate(h2, _dot(delta, w3_back, tl.zeros((CELLS, HIDDEN2), tl.float32), DOT))
        _add(sums + B2 + tl.arange(0, HIDDEN2), tl.sum(dh2, 0))
        if CHUNK == HIDDEN1:
            dw2 = _dot(_transposed(h1, DOT), dh2, dw2, DOT)
            dh1 = _gate(h1, _dot(dh2, w2_back, tl.zeros((CELLS, HIDDEN1), tl.float32), DOT))
            _add_first_bias(sums, places_sums, dh1, tl.arange(0, HIDDEN1), TILE_HEIGHT, TILE_WIDTH, DOT)
            dw1 = _dot(_transposed(p, DOT), dh1, dw1, DOT)
            dp = _dot(dh1, w1_back, dp, DOT)
        else:
            for j in range(0, HIDDEN1, CHUNK):
                if DOT == "tf32":
                    p += 0.0
                    dh2 += 0.0
                    if context is not None:
                        is_at += 0.0
                unit = j + tl.arange(0, CHUNK)
                in_w1, in_w2 = _places(unit)
                w1_units, w2_units = tl.load(w1 + in_w1), tl.load(w2 + in_w2)
                h1_units = _units(p, w1_units, biases, is_at, places, unit, DOT)
                dw2 = _dot(_transposed(h1_units, DOT), dh2, tl.zeros((CHUNK, HIDDEN2), tl.float32), DOT)
                _add(sums + W2 + in_w2, dw2)
                dh1 = _gate(h1_units, _dot(dh2, tl.trans(w2_units), tl.zeros((CELLS, CHUNK), tl.float32), DOT))
                _add_first_bias(sums, places_sums, dh1, unit, TILE_HEIGHT, TILE_WIDTH, DOT)
                dw1 = _dot(_transposed(p, DOT), dh1, tl.zeros((PERCEPTION, CHUNK), tl.float32), DOT)
                _add(sums + in_w1, dw1)
                dp = _dot(dh1, tl.trans(w1_units), dp, DOT)

        even, odd = tl.split(tl.reshape(dp, (CELLS, CHANNELS, 2, 2)))
        d_state, d_sobel_y = tl.split(even)
        d_sobel_x, d_laplacian = tl.split(odd)
        where = gradient_perception + first * PERCEPTION + (local * PERCEPTION)[:, None] + channel[None, :]
        exists = (y >= 0)[:, None]
        tl.store(where, d_state + d_kept, mask=exists)
        tl.store(where + CHANNELS, d_sobel_x, mask=exists)
        tl.store(where + 2 * CHANNELS, d_sobel_y, mask=exists)
        tl.store(where + 3 * CHANNELS, d_laplacian, mask=exists)
    if CHUNK == HIDDEN1:
        _add_matrix(sums, dw1, HIDDEN1)
        _add_matrix(sums + W2, dw2, HIDDEN2)
    _add_matrix(sums + W3, dw3, CHANNELS)


@triton.jit
def _part(gradient, y, x, local, height, width, dy: tl.constexpr, dx: tl.constexpr, PART: tl.constexpr):
    """[cells, 16]: one of the four parts of the neighbor's perception gradient, zero outside the grid."""
    offset = (local + (dy * width + dx)) * PERCEPTION + PART * CHANNELS
    inside = in_grid(y + dy, x + dx, height, width)
    return tl.load(gradient + offset[:, None] + tl.arange(0, CHANNELS)[None, :], mask=inside[:, None], other=0.0)


@triton.jit
def _smooth_part(gradient, y, x, local, height, width, dx: tl.constexpr, PART: tl.constexpr):
    middle = _part(gradient, y, x, local, height, width, 0, dx, PART)
    above = _part(gradient, y, x, local, height, width, -1, dx, PART)
    return above + 2.0 * middle + _part(gradient, y, x, local, height, width, 1, dx, PART), middle


@triton.jit
def _slope_part(gradient, y, x, local, height, width, dx: tl.constexpr, PART: tl.constexpr):
    above = _part(gradient, y, x, local, height, width, -1, dx, PART)
    return above - _part(gradient, y, x, local, height, width, 1, dx, PART)


@triton.jit(do_not_specialize=SIZES)
def stencil_backward(
    state_from,
    gradient_perception,
    gradient_from,
    batch,
    mel_height,
    mel_width,
    linear_height,
    linear_width,
    MASKED: tl.constexpr,
    TILE_HEIGHT: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
):
    """The transposed filters: from the gradient of the perception to that of the state as the step saw it and, where it
    was masked, of every cell's life."""
    cells = count_cells(batch, mel_height, mel_width, linear_height, linear_width)
    _, _, first, _, _, height, width, y, x, local = locate(
        tl.program_id(0), batch, mel_height, mel_width, linear_height, linear_width, TILE_HEIGHT, TILE_WIDTH
    )
    parts = gradient_perception + first * PERCEPTION
    gradient = _part(parts, y, x, local, height, width, 0, 0, 0)
    left, _ = _smooth_part(parts, y, x, local, height, width, -1, 1)
    right, _ = _smooth_part(parts, y, x, local, height, width, 1, 1)
    gradient += left - right
    gradient += _slope_part(parts, y, x, local, height, width, -1, 2)
    gradient += 2.0 * _slope_part(parts, y, x, local, height, width, 0, 2)
    gradient += _slope_part(parts, y, x, local, height, width, 1, 2)
    left, _ = _smooth_part(parts, y, x, local, height, width, -1, 3)
    center, own = _smooth_part(parts, y, x, local, height, width, 0, 3)
    right, _ = _smooth_part(parts, y, x, local, height, width, 1, 3)
    gradient += left + 2.0 * center + right - 16.0 * own

    _store_row(gradient_from, state_from, gradient, first, cells, y, x, local, height, width, MASKED)


@triton.jit
def _planar(mel, linear, is_linear, sample, y, x, height, width):
    """Addresses [cells, 16] in the contiguous [N, 16, H, W] tensor of the tile's grid."""
    planar = linear if is_linear else mel
    plane = height.to(tl.int64) * width
    channel = sample * CHANNELS + tl.arange(0, CHANNELS)
    return planar + (y.to(tl.int64) * width + x)[:, None] + (channel * plane)[None, :]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=CALLERS_TENSORS)
def load_planar(
    mel,
    linear,
    state,
    rows,
    batch,
    mel_height,
    mel_width,
    linear_height,
    linear_width,
    MASKED: tl.constexpr,
    TILE_HEIGHT: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
):
    """Copies both grids [N, 16, H, W] into `rows`: an initial state, or the gradient of a final state, which `state` is
    and which was read through its life mask (`MASKED`)."""
    cells = count_cells(batch, mel_height, mel_width, linear_height, linear_width)
    is_linear, sample, first, _, _, height, width, y, x, local = locate(
        tl.program_id(0), batch, mel_height, mel_width, linear_height, linear_width, TILE_HEIGHT, TILE_WIDTH
    )
    planar = _planar(mel, linear, is_linear, sample, y, x, height, width)
    values = tl.load(planar, mask=(y >= 0)[:, None], other=0.0)
    _store_row(rows, state, values, first, cells, y, x, local, height, width, MASKED)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=CALLERS_TENSORS)
def store_planar(
    rows,
    mel,
    linear,
    batch,
    mel_height,
    mel_width,
    linear_height,
    linear_width,
    MASKED: tl.constexpr,
    TILE_HEIGHT: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
):
    """Copies `rows`, a state read through its life mask (`MASKED`) or a gradient, into both grids [N, 16, H, W]."""
    cells = count_cells(batch, mel_height, mel_width, linear_height, linear_width)
    is_linear, sample, first, _, _, height, width, y, x, local = locate(
        tl.program_id(0), batch, mel_height, mel_width, linear_height, linear_width, TILE_HEIGHT, TILE_WIDTH
    )
    values = load_values(rows + first * CHANNELS, y, x, local, height, width, 0, 0)
    if MASKED:
        plane = rows + cells * CHANNELS + first
        life = find_life(plane, y, x, local, height, width)
        tl.store(plane + cells + local, life, mask=y >= 0)
        values *= life[:, None]
    planar = _planar(mel, linear, is_linear, sample, y, x, height, width)
    tl.store(planar, values, mask=(y >= 0)[:, None])


@triton.jit(do_not_specialize=["groups"])
def sum_groups(gradient_groups, gradient, groups, BLOCK: tl.constexpr):
    """Adds up the rows of `gradient_groups` in their order, in double precision: there is one row per program."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = place < PARAMETERS
    sum = tl.zeros((BLOCK,), tl.float64)
    for group in range(groups):
        row = gradient_groups + tl.cast(group, tl.int64) * PARAMETERS
        sum += tl.load(row + place, mask=exists, other=0.0).to(tl.float64)
    tl.store(gradient + place, sum.to(tl.float32), mask=exists)


@triton.jit
def _sum_tiles(
    sum, sums, place, columns, rows, first, height, width, TILE_HEIGHT: tl.constexpr, TILE_WIDTH: tl.constexpr
):
    """Adds what the tiles of a grid, the first of them `first`, have for a place in the order of these tiles. `columns`
    is the first column's place and `rows` that of the grid's first row."""
    across = tl.cdiv(width, TILE_WIDTH)
    is_column = place >= columns
    x = place - columns
    y = place - rows
    count = tl.where((y >= 0) & (y < height), across, 0)
    count = tl.where(is_column, tl.cdiv(height, TILE_HEIGHT), count)
    tile = first + tl.where(is_column, x // TILE_WIDTH, y // TILE_HEIGHT * across)
    stride = tl.where(is_column, across, 1)
    number = tl.where(is_column, TILE_HEIGHT + x % TILE_WIDTH, y % TILE_HEIGHT)
    for k in range(count):
        row = (tile + k * stride).to(tl.int64) * (TILE_HEIGHT + TILE_WIDTH) + number
        sum += tl.load(sums + row * HIDDEN1 + tl.arange(0, HIDDEN1)).to(tl.float64)
    return sum


@triton.jit(do_not_specialize=SIZES)
def sum_places(
    gradient_places,
    gradient,
    batch,
    mel_height,
    mel_width,
    linear_height,
    linear_width,
    TILE_HEIGHT: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
):
    """The gradient of the context: adds up what the tiles have for each of its places, in double precision. There is
    one program per place."""
    columns = mel_height + linear_height
    sample = tl.program_id(0) // (columns + mel_width)
    place = tl.program_id(0) % (columns + mel_width)
    sum = tl.zeros((HIDDEN1,), tl.float64)
    first = count_tiles(sample, mel_height, mel_width, TILE_HEIGHT, TILE_WIDTH)
    sum = _sum_tiles(sum, gradient_places, place, columns, 0, first, mel_height, mel_width, TILE_HEIGHT, TILE_WIDTH)
    first = count_tiles(batch, mel_height, mel_width, TILE_HEIGHT, TILE_WIDTH)
    first += count_tiles(sample, linear_height, linear_width, TILE_HEIGHT, TILE_WIDTH)
    sum = _sum_tiles(
        sum, gradient_places, place, columns, mel_height, first, linear_height, linear_width, TILE_HEIGHT, TILE_WIDTH
    )
    where = gradient + tl.program_id(0).to(tl.int64) * HIDDEN1 + tl.arange(0, HIDDEN1)
    tl.store(where, sum.to(tl.float32))
