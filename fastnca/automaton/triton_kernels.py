"""The Triton kernels. Only triton.py imports this module, at its first launch: it imports Triton.

A state is one row of floats: [cells][16] values, all cells of mel before those of lin, then, with the life mask, two
planes [cells]. The values are what a step computed, alpha already clamped to [0, 1]; the life mask is applied when
they are read (`MASKED`; the initial state has none), so that a step needs no second pass over its neighbours. The
first plane is alpha before the clamp: it makes the 25 reads of a cell's surroundings contiguous, and the backward pass
takes the clamp's gate from it. The second is the life mask, which the step that reads the state leaves there for the
backward pass. A gradient is a row of the same form: its values are the gradient of the state times the life mask, its
first plane is the gradient of life and its second says which windows the cell's alpha has won (see `_wins`).

A program works on tiles of TILE_HEIGHT x TILE_WIDTH cells; a tile lies in one sample of one grid.
"""

import triton
import triton.language as tl

# A gradient of the 64 perceived values is stored as [cell][4][16]; in registers, and in the packed first layer, the
# order is [16][4], which is what joining the four parts of a channel gives without moving data.
CHANNELS = tl.constexpr(16)
PERCEPTION = tl.constexpr(64)
HIDDEN1 = tl.constexpr(128)
HIDDEN2 = tl.constexpr(64)
ALPHA = tl.constexpr(1)

# Offsets of the layers in the packed weights and in the gradient of a group: w1 [64, 128], w2 [128, 64], w3 [64, 16],
# all [in, out], and the biases.
W2 = tl.constexpr(64 * 128)
W3 = tl.constexpr(2 * 64 * 128)
B1 = tl.constexpr(2 * 64 * 128 + 64 * 16)
B2 = tl.constexpr(2 * 64 * 128 + 64 * 16 + 128)
B3 = tl.constexpr(2 * 64 * 128 + 64 * 16 + 128 + 64)
PARAMETERS = tl.constexpr(2 * 64 * 128 + 64 * 16 + 128 + 64 + 16)

NAN = tl.constexpr(tl.PropagateNan.ALL)
NO_CELL = tl.constexpr(-8)

# Nothing is specialised on a number, nor on the address of a tensor that comes from outside: which binaries exist
# depends on the configuration alone, and none is compiled because a grid got another size.
_SIZES = ["batch", "mel_height", "mel_width", "lin_height", "lin_width"]


@triton.jit
def _tiles(batch, height, width, TILE_HEIGHT: tl.constexpr, TILE_WIDTH: tl.constexpr):
    return batch * tl.cdiv(height, TILE_HEIGHT) * tl.cdiv(width, TILE_WIDTH)


@triton.jit
def _locate(
    tile,
    batch,
    mel_height,
    mel_width,
    lin_height,
    lin_width,
    TILE_HEIGHT: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
):
    """-> whether the tile is of lin, its sample, its first cell in the state, its grid's height and width, and of each
    of its cells the row, the column and the place relative to the first. A cell outside the grid gets the row NO_CELL:
    it has no neighbours either."""
    mel_tiles = _tiles(batch, mel_height, mel_width, TILE_HEIGHT, TILE_WIDTH)
    is_lin = tile >= mel_tiles
    height = tl.where(is_lin, lin_height, mel_height)
    width = tl.where(is_lin, lin_width, mel_width)
    before = tl.where(is_lin, mel_height.to(tl.int64) * mel_width * batch, 0)
    tile = tl.where(is_lin, tile - mel_tiles, tile)
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
    return is_lin, sample.to(tl.int64), first, height, width, y, x, local


@triton.jit
def _cells(batch, mel_height, mel_width, lin_height, lin_width):
    return (mel_height.to(tl.int64) * mel_width + lin_height.to(tl.int64) * lin_width) * batch


@triton.jit
def _inside(y, x, height, width):
    return (y >= 0) & (y < height) & (x >= 0) & (x < width)


@triton.jit
def _values(rows, y, x, local, height, width, dy: tl.constexpr, dx: tl.constexpr):
    """[cells, 16]: the neighbour's values, zero outside the grid. `rows` points to the tile's first cell."""
    offset = (local + (dy * width + dx)) * CHANNELS
    inside = _inside(y + dy, x + dx, height, width)
    return tl.load(rows + offset[:, None] + tl.arange(0, CHANNELS)[None, :], mask=inside[:, None], other=0.0)


@triton.jit
def _scalar(plane, y, x, local, height, width, dy: tl.constexpr, dx: tl.constexpr):
    """[cells]: the neighbour's number in a plane, zero outside the grid."""
    return tl.load(plane + local + (dy * width + dx), mask=_inside(y + dy, x + dx, height, width), other=0.0)


@triton.jit
def _clamped(alpha):
    return tl.clamp(alpha, 0.0, 1.0, propagate_nan=NAN)


@triton.jit
def _maximum(a, b, c):
    return tl.maximum(tl.maximum(a, b, propagate_nan=NAN), c, propagate_nan=NAN)


@triton.jit
def _window(left, middle, right):
    """The life of the window that these three columns' maxima make up."""
    return _clamped(_maximum(left, middle, right))


@triton.jit
def _vertical_maxima(alpha, y, x, local, height, width, dx: tl.constexpr):
    """Of the alpha of three cells above one another, in the column dx: around the rows -1, 0 and 1. The clamp can wait
    until the maximum over a window is known, and with it a zero outside the grid changes no life: that is never below
    zero."""
    a0 = _scalar(alpha, y, x, local, height, width, -2, dx)
    a1 = _scalar(alpha, y, x, local, height, width, -1, dx)
    a2 = _scalar(alpha, y, x, local, height, width, 0, dx)
    a3 = _scalar(alpha, y, x, local, height, width, 1, dx)
    a4 = _scalar(alpha, y, x, local, height, width, 2, dx)
    return _maximum(a0, a1, a2), _maximum(a1, a2, a3), _maximum(a2, a3, a4)


@triton.jit
def _three(plane, y, x, local, height, width, dx: tl.constexpr):
    """The numbers of a plane in the rows -1, 0 and 1 of the column dx."""
    above = _scalar(plane, y, x, local, height, width, -1, dx)
    middle = _scalar(plane, y, x, local, height, width, 0, dx)
    return above, middle, _scalar(plane, y, x, local, height, width, 1, dx)


@triton.jit
def _life(alpha, y, x, local, height, width):
    """[cells]: maximum of the clamped alpha over the 3x3 window."""
    _, left, _ = _vertical_maxima(alpha, y, x, local, height, width, -1)
    _, middle, _ = _vertical_maxima(alpha, y, x, local, height, width, 0)
    _, right, _ = _vertical_maxima(alpha, y, x, local, height, width, 1)
    return _window(left, middle, right)


@triton.jit
def _column(values, y, x, local, height, width, dx: tl.constexpr, upper, middle, lower):
    """The three cells of the 3x3 window in the column dx, as the step sees them -> smoothed and differentiated
    vertically, and the middle one. The filters' zeros multiply too: of an infinity they are NaN, as in PyTorch."""
    above = _values(values, y, x, local, height, width, -1, dx)
    centre = _values(values, y, x, local, height, width, 0, dx)
    below = _values(values, y, x, local, height, width, 1, dx)
    # A window that reaches into the grid has a life, but a cell outside is zero whatever that life is. Where there is
    # no mask the product with one keeps the compiler from loading every cell once per thread that needs it.
    above *= tl.where(_inside(y - 1, x + dx, height, width), upper, 0.0)[:, None]
    centre *= tl.where(_inside(y, x + dx, height, width), middle, 0.0)[:, None]
    below *= tl.where(_inside(y + 1, x + dx, height, width), lower, 0.0)[:, None]
    return above + 2.0 * centre + below, below - above + 0.0 * centre, centre


@triton.jit
def _perceive(values, alpha, life, y, x, local, height, width, MASKED: tl.constexpr, LIFE_KNOWN: tl.constexpr):
    """-> the state that the step sees [cells, 16], the perception [cells, 64] in the order [16][4], the cells' life."""
    l0, l1, l2, c0, c1, c2, r0, r1, r2 = 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0
    if MASKED and LIFE_KNOWN:
        l0, l1, l2 = _three(life, y, x, local, height, width, -1)
        c0, c1, c2 = _three(life, y, x, local, height, width, 0)
        r0, r1, r2 = _three(life, y, x, local, height, width, 1)
    elif MASKED:
        p0, p1, p2 = _vertical_maxima(alpha, y, x, local, height, width, -2)
        q0, q1, q2 = _vertical_maxima(alpha, y, x, local, height, width, -1)
        s0, s1, s2 = _vertical_maxima(alpha, y, x, local, height, width, 0)
        t0, t1, t2 = _vertical_maxima(alpha, y, x, local, height, width, 1)
        u0, u1, u2 = _vertical_maxima(alpha, y, x, local, height, width, 2)
        l0, l1, l2 = _window(p0, q0, s0), _window(p1, q1, s1), _window(p2, q2, s2)
        c0, c1, c2 = _window(q0, s0, t0), _window(q1, s1, t1), _window(q2, s2, t2)
        r0, r1, r2 = _window(s0, t0, u0), _window(s1, t1, u1), _window(s2, t2, u2)
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


@triton.jit(do_not_specialize=_SIZES)
def step(
    state_from,
    state_to,
    weights,
    biases,
    batch,
    mel_height,
    mel_width,
    lin_height,
    lin_width,
    MASKED: tl.constexpr,
    LIFE_MASK: tl.constexpr,
    TILE_HEIGHT: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    DOT: tl.constexpr,
):
    """One step of both grids: the state `state_to` from `state_from`, in which it leaves the life mask."""
    CELLS: tl.constexpr = TILE_HEIGHT * TILE_WIDTH
    cells = _cells(batch, mel_height, mel_width, lin_height, lin_width)
    tiles = _tiles(batch, mel_height, mel_width, TILE_HEIGHT, TILE_WIDTH)
    tiles += _tiles(batch, lin_height, lin_width, TILE_HEIGHT, TILE_WIDTH)
    channel = tl.arange(0, CHANNELS)
    if CHUNK == HIDDEN1:
        w1 = _matrix(weights, PERCEPTION, HIDDEN1)
        w2 = _matrix(weights + W2, HIDDEN1, HIDDEN2)
    w3 = _matrix(weights + W3, HIDDEN2, CHANNELS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        _, _, first, height, width, y, x, local = _locate(
            tile, batch, mel_height, mel_width, lin_height, lin_width, TILE_HEIGHT, TILE_WIDTH
        )
        values = state_from + first * CHANNELS
        alpha = state_from + cells * CHANNELS + first
        state, p, life = _perceive(values, alpha, alpha, y, x, local, height, width, MASKED, False)
        exists = y >= 0
        if MASKED:
            tl.store(alpha + cells + local, life, mask=exists)
        b2 = tl.load(biases + HIDDEN1 + tl.arange(0, HIDDEN2))
        h2 = tl.zeros((CELLS, HIDDEN2), tl.float32) + b2[None, :]
        if CHUNK == HIDDEN1:
            b1 = tl.load(biases + tl.arange(0, HIDDEN1))
            h1 = _relu(_dot(p, w1, tl.zeros((CELLS, HIDDEN1), tl.float32) + b1[None, :], DOT))
            h2 = _dot(h1, w2, h2, DOT)
        else:
            for j in range(0, HIDDEN1, CHUNK):
                unit = j + tl.arange(0, CHUNK)
                w1 = tl.load(weights + tl.arange(0, PERCEPTION)[:, None] * HIDDEN1 + unit[None, :])
                w2 = tl.load(weights + W2 + unit[:, None] * HIDDEN2 + tl.arange(0, HIDDEN2)[None, :])
                b1 = tl.load(biases + unit)
                h1 = _relu(_dot(p, w1, tl.zeros((CELLS, CHUNK), tl.float32) + b1[None, :], DOT))
                h2 = _dot(h1, w2, h2, DOT)
        b3 = tl.load(biases + HIDDEN1 + HIDDEN2 + channel)
        u = state + _dot(_relu(h2), w3, tl.zeros((CELLS, CHANNELS), tl.float32) + b3[None, :], DOT)
        where = state_to + first * CHANNELS + (local * CHANNELS)[:, None] + channel[None, :]
        if LIFE_MASK:
            is_alpha = (channel == ALPHA)[None, :]
            tl.store(where, tl.where(is_alpha, _clamped(u), u), mask=exists[:, None])
            plane = state_to + cells * CHANNELS + first + local
            tl.store(plane[:, None] + tl.zeros((1, CHANNELS), tl.int32), u, mask=exists[:, None] & is_alpha)
        else:
            tl.store(where, u, mask=exists[:, None])


@triton.jit
def _beaten(alpha, own, y, x, local, height, width, dy: tl.constexpr, dx: tl.constexpr):
    """Whether the cell's own clamped alpha goes before the neighbour's where a window has both: the first maximum in
    row-major order wins, and a NaN beats everything before it."""
    near = _clamped(_scalar(alpha, y, x, local, height, width, dy, dx))
    if dy < 0 or (dy == 0 and dx < 0):
        beaten = (own > near) | (own != own)
    else:
        beaten = (near <= own) | ((own != own) & (near == near))
    return beaten | (_inside(y + dy, x + dx, height, width) == 0)


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
    neighbour, and bit 9 that the clamp passes the gradient."""
    raw = _scalar(alpha, y, x, local, height, width, 0, 0)
    own = _clamped(raw)
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
        gradient *= _scalar(state + plane + cells, y, x, local, height, width, 0, 0)[:, None]
    tl.store(rows + where, gradient, mask=exists[:, None])


@triton.jit
def _delta(gradient, first, cells, y, x, local, height, width, LIFE_MASK: tl.constexpr):
    """[cells, 16]: the gradient of what a step computed, before the clamp."""
    delta = _values(gradient + first * CHANNELS, y, x, local, height, width, 0, 0)
    if LIFE_MASK:
        life_gradient = gradient + cells * CHANNELS + first
        wins = _scalar(life_gradient + cells, y, x, local, height, width, 0, 0).to(tl.int32)
        won = tl.zeros(y.shape, tl.float32)
        for k in tl.static_range(9):
            near = _scalar(life_gradient, y, x, local, height, width, k // 3 - 1, k % 3 - 1)
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


@triton.jit(do_not_specialize=_SIZES)
def network_backward(
    state_from,
    gradient_to,
    gradient_perception,
    gradient_groups,
    weights,
    biases,
    batch,
    mel_height,
    mel_width,
    lin_height,
    lin_width,
    MASKED: tl.constexpr,
    LIFE_MASK: tl.constexpr,
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
    cells = _cells(batch, mel_height, mel_width, lin_height, lin_width)
    tiles = _tiles(batch, mel_height, mel_width, TILE_HEIGHT, TILE_WIDTH)
    tiles += _tiles(batch, lin_height, lin_width, TILE_HEIGHT, TILE_WIDTH)
    channel = tl.arange(0, CHANNELS)
    sums = gradient_groups + tl.program_id(0).to(tl.int64) * PARAMETERS
    back = weights + B1
    if CHUNK == HIDDEN1:
        w1 = _matrix(weights, PERCEPTION, HIDDEN1)
        w2 = _matrix(weights + W2, HIDDEN1, HIDDEN2)
        w1_back = _matrix(back, HIDDEN1, PERCEPTION)
        w2_back = _matrix(back + W2, HIDDEN2, HIDDEN1)
        dw1 = tl.zeros((PERCEPTION, HIDDEN1), tl.float32)
        dw2 = tl.zeros((HIDDEN1, HIDDEN2), tl.float32)
    dw3 = tl.zeros((HIDDEN2, CHANNELS), tl.float32)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        _, _, first, height, width, y, x, local = _locate(
            tile, batch, mel_height, mel_width, lin_height, lin_width, TILE_HEIGHT, TILE_WIDTH
        )
        values = state_from + first * CHANNELS
        life = state_from + cells * (CHANNELS + 1) + first
        _, p, _ = _perceive(values, life, life, y, x, local, height, width, MASKED, True)
        delta = _delta(gradient_to, first, cells, y, x, local, height, width, LIFE_MASK)
        dp = tl.zeros((CELLS, PERCEPTION), tl.float32)
        b2 = tl.load(biases + HIDDEN1 + tl.arange(0, HIDDEN2))
        h2 = tl.zeros((CELLS, HIDDEN2), tl.float32) + b2[None, :]
        if CHUNK == HIDDEN1:
            b1 = tl.load(biases + tl.arange(0, HIDDEN1))
            h1 = _relu(_dot(p, w1, tl.zeros((CELLS, HIDDEN1), tl.float32) + b1[None, :], DOT))
            h2 = _relu(_dot(h1, w2, h2, DOT))
        else:
            for j in range(0, HIDDEN1, CHUNK):
                if DOT == "tf32":
                    p += 0.0  # or the copies of it as an operand would be held in registers throughout the loop
                unit = j + tl.arange(0, CHUNK)
                w1 = tl.load(weights + tl.arange(0, PERCEPTION)[:, None] * HIDDEN1 + unit[None, :])
                w2 = tl.load(weights + W2 + unit[:, None] * HIDDEN2 + tl.arange(0, HIDDEN2)[None, :])
                b1 = tl.load(biases + unit)
                h1 = _relu(_dot(p, w1, tl.zeros((CELLS, CHUNK), tl.float32) + b1[None, :], DOT))
                h2 = _dot(h1, w2, h2, DOT)
            h2 = _relu(h2)
        dw3 = _dot(_transposed(h2, DOT), delta, dw3, DOT)
        _add(sums + B3 + channel, tl.sum(delta, 0))
        w3_back = _matrix(back + W3, CHANNELS, HIDDEN2)
        dh2 = _gate(h2, _dot(delta, w3_back, tl.zeros((CELLS, HIDDEN2), tl.float32), DOT))
        _add(sums + B2 + tl.arange(0, HIDDEN2), tl.sum(dh2, 0))
        if CHUNK == HIDDEN1:
            dw2 = _dot(_transposed(h1, DOT), dh2, dw2, DOT)
            dh1 = _gate(h1, _dot(dh2, w2_back, tl.zeros((CELLS, HIDDEN1), tl.float32), DOT))
            _add(sums + B1 + tl.arange(0, HIDDEN1), tl.sum(dh1, 0))
            dw1 = _dot(_transposed(p, DOT), dh1, dw1, DOT)
            dp = _dot(dh1, w1_back, dp, DOT)
        else:
            for j in range(0, HIDDEN1, CHUNK):
                if DOT == "tf32":
                    p += 0.0
                    dh2 += 0.0
                unit = j + tl.arange(0, CHUNK)
                place1 = tl.arange(0, PERCEPTION)[:, None] * HIDDEN1 + unit[None, :]
                place2 = W2 + unit[:, None] * HIDDEN2 + tl.arange(0, HIDDEN2)[None, :]
                w1 = tl.load(weights + place1)
                w2 = tl.load(weights + place2)
                b1 = tl.load(biases + unit)
                h1 = _relu(_dot(p, w1, tl.zeros((CELLS, CHUNK), tl.float32) + b1[None, :], DOT))
                _add(sums + place2, _dot(_transposed(h1, DOT), dh2, tl.zeros((CHUNK, HIDDEN2), tl.float32), DOT))
                dh1 = _gate(h1, _dot(dh2, tl.trans(w2), tl.zeros((CELLS, CHUNK), tl.float32), DOT))
                _add(sums + B1 + unit, tl.sum(dh1, 0))
                _add(sums + place1, _dot(_transposed(p, DOT), dh1, tl.zeros((PERCEPTION, CHUNK), tl.float32), DOT))
                dp = _dot(dh1, tl.trans(w1), dp, DOT)

        even, odd = tl.split(tl.reshape(dp, (CELLS, CHANNELS, 2, 2)))
        d_state, d_sobel_y = tl.split(even)
        d_sobel_x, d_laplacian = tl.split(odd)
        where = gradient_perception + first * PERCEPTION + (local * PERCEPTION)[:, None] + channel[None, :]
        exists = (y >= 0)[:, None]
        tl.store(where, d_state + delta, mask=exists)
        tl.store(where + CHANNELS, d_sobel_x, mask=exists)
        tl.store(where + 2 * CHANNELS, d_sobel_y, mask=exists)
        tl.store(where + 3 * CHANNELS, d_laplacian, mask=exists)
    if CHUNK == HIDDEN1:
        _add_matrix(sums, dw1, HIDDEN1)
        _add_matrix(sums + W2, dw2, HIDDEN2)
    _add_matrix(sums + W3, dw3, CHANNELS)


@triton.jit
def _part(gradient, y, x, local, height, width, dy: tl.constexpr, dx: tl.constexpr, PART: tl.constexpr):
    """[cells, 16]: one of the four parts of the neighbour's perception gradient, zero outside the grid."""
    offset = (local + (dy * width + dx)) * PERCEPTION + PART * CHANNELS
    inside = _inside(y + dy, x + dx, height, width)
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


@triton.jit(do_not_specialize=_SIZES)
def stencil_backward(
    state_from,
    gradient_perception,
    gradient_from,
    batch,
    mel_height,
    mel_width,
    lin_height,
    lin_width,
    MASKED: tl.constexpr,
    TILE_HEIGHT: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
):
    """The transposed filters: from the gradient of the perception to that of the state as the step saw it and, where it
    was masked, of every cell's life."""
    cells = _cells(batch, mel_height, mel_width, lin_height, lin_width)
    _, _, first, height, width, y, x, local = _locate(
        tl.program_id(0), batch, mel_height, mel_width, lin_height, lin_width, TILE_HEIGHT, TILE_WIDTH
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
    centre, own = _smooth_part(parts, y, x, local, height, width, 0, 3)
    right, _ = _smooth_part(parts, y, x, local, height, width, 1, 3)
    gradient += left + 2.0 * centre + right - 16.0 * own

    _store_row(gradient_from, state_from, gradient, first, cells, y, x, local, height, width, MASKED)


@triton.jit
def _planar(mel, lin, is_lin, sample, y, x, height, width):
    """Addresses [cells, 16] in the contiguous [N, 16, H, W] tensor of the tile's grid."""
    planar = lin if is_lin else mel
    plane = height.to(tl.int64) * width
    channel = sample * CHANNELS + tl.arange(0, CHANNELS)
    return planar + (y.to(tl.int64) * width + x)[:, None] + (channel * plane)[None, :]


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=["mel", "lin"])
def load_planar(
    mel,
    lin,
    state,
    rows,
    batch,
    mel_height,
    mel_width,
    lin_height,
    lin_width,
    MASKED: tl.constexpr,
    TILE_HEIGHT: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
):
    """Copies both grids [N, 16, H, W] into `rows`: an initial state, or the gradient of a final state, which `state` is
    and which was read through its life mask (`MASKED`)."""
    cells = _cells(batch, mel_height, mel_width, lin_height, lin_width)
    is_lin, sample, first, height, width, y, x, local = _locate(
        tl.program_id(0), batch, mel_height, mel_width, lin_height, lin_width, TILE_HEIGHT, TILE_WIDTH
    )
    planar = _planar(mel, lin, is_lin, sample, y, x, height, width)
    values = tl.load(planar, mask=(y >= 0)[:, None], other=0.0)
    _store_row(rows, state, values, first, cells, y, x, local, height, width, MASKED)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=["mel", "lin"])
def store_planar(
    rows,
    mel,
    lin,
    batch,
    mel_height,
    mel_width,
    lin_height,
    lin_width,
    MASKED: tl.constexpr,
    TILE_HEIGHT: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
):
    """Copies `rows`, a state read through its life mask (`MASKED`) or a gradient, into both grids [N, 16, H, W]."""
    cells = _cells(batch, mel_height, mel_width, lin_height, lin_width)
    is_lin, sample, first, height, width, y, x, local = _locate(
        tl.program_id(0), batch, mel_height, mel_width, lin_height, lin_width, TILE_HEIGHT, TILE_WIDTH
    )
    values = _values(rows + first * CHANNELS, y, x, local, height, width, 0, 0)
    if MASKED:
        plane = rows + cells * CHANNELS + first
        life = _life(plane, y, x, local, height, width)
        tl.store(plane + cells + local, life, mask=y >= 0)
        values *= life[:, None]
    planar = _planar(mel, lin, is_lin, sample, y, x, height, width)
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
