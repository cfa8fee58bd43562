"""What the numbers of the table mean that tells the kernels about a call: one description for host and device."""

from enum import IntEnum

AXES = 3
MOST_STAGES = 32
FINISH_ROWS, FINISH_COLUMNS = 32, 64
"""The tile in which partial sums of parameters' gradients are added up."""


class Strategy(IntEnum):
    """How rows are shared out among programs."""

    SINGLE = 0
    """A row takes one program, which holds it on chip between its one read and its write."""
    LOOPED = 1
    """A row takes one program, which goes through all stages and reads the row twice."""
    STAGED = 2
    """A row is cut into items, stage by stage, and each takes a program."""


class Activation(IntEnum):
    """What stands behind the norm, named as in `divnorm_kernels.norm.ACTIVATIONS`."""

    NONE = 0
    RELU = 1
    SILU = 2
    GELU = 3
    GELU_TANH = 4
    TLU = 5


class Header(IntEnum):
    """The head of the table."""

    STAGES = 0
    STEP_ITEMS = 1
    CHUNKS = 2
    FINISH = 3
    """The first item of the finish, which adds up the partial sums."""
    AWAITED = 4
    """The items that the finish waits for."""
    BATCH = 5
    GROUPS = 6
    ITEMS = 7
    """The items that share the rows where a program holds a row."""
    STATISTICS_TILES = 8
    SPLITS = 9
    """The pieces that the positions are split into in the second pass."""
    SPLIT_BLOCKS = 10
    """The tiles of a piece."""
    CHANNEL_BLOCKS = 11
    """The blocks of channels that an item of the second pass takes."""
    BUFFER = 12
    """The numbers in a scratch buffer."""
    LEVELS = 13
    """The first of the buffers that hold sums of blocks."""
    RSTD = 14
    """Where rstd begins in the maps."""
    VARIANCE = 15
    """Where the variances of rows begin in the maps; 0 where they are not kept."""
    PARTIALS = 16
    """Where the partial sums of l1, or of dweight, begin in the scratch memory; then those of dbias, dthreshold and
    dsigma."""
    PARTIALS_BIAS = 17
    PARTIALS_THRESHOLD = 18
    PARTIALS_SIGMA = 19
    PARTIAL_ROWS = 20
    PARTIAL_COLUMNS = 21
    SIGMAS = 22
    FIELDS = 23
    """The summation field, then the suppression field: `AXES` axes of `FieldColumn` each."""


class FieldColumn(IntEnum):
    """An axis of a field."""

    EXTENT = 0
    STRIDE = 1
    LO = 2
    HI = 3
    DIVISOR = 4


STAGES_AT = Header.FIELDS + 2 * AXES * len(FieldColumn)
"""Where the stages begin in the table."""


class Column(IntEnum):
    """A stage."""

    BEGIN = 0
    """The first of its items in a step."""
    COUNT = 1
    """Its items in a chunk."""
    LAG = 2
    """The steps that it follows the statistics by."""
    KIND = 3
    ROWS = 4
    """The rows, or map rows, of a chunk."""
    ALL_ROWS = 5
    TILES = 6
    """The items of a row."""
    SOURCE = 7
    TARGET = 8
    STRIDE = 9
    EXTENT = 10
    LO = 11
    HI = 12
    LEVELS = 13
    RADIX = 14
    SIZE = 15
    """The positions in a block of the topmost level."""
    BOUND = 16
    """The most blocks of the topmost level in a window."""
    EPILOGUE = 17
    OUTER_STRIDE = 18
    OUTER_EXTENT = 19
    OUTER_LO = 20
    OUTER_BOUND = 21
    """The positions of a second axis that are summed over in the same stage."""


class Kind(IntEnum):
    """What a stage's items do."""

    STATISTICS = 0
    MERGE = 1
    WINDOW = 2
    APPLY = 3
    DEVIATIONS = 4
    """Forward, p = 1 with a summation field: the mean of abs(v) over the channels, once mu is known."""


class Buffer(IntEnum):
    """The scratch maps, one float32 per position and row."""

    MEAN = 0
    """Forward: mean over the channels."""
    VARIANCE = 1
    """Forward: mean over the channels of the squared distance from that mean, then from mu; for p = 1 of abs(v)."""
    FIRST = 2
    SECOND = 3
    """Sums over some of the axes. Forward, where a row is one number, FIRST holds what rounding left of MEAN."""
    SCALE = 0
    """Backward: the source of a = B'[P2/s^3]/n, for p = 1 B'[c_1 P2/s^2]/n; once that is done, A'[d]/n."""
    SHIFT = 1
    """Backward: P1/s, then the source d of A'."""
    SLOPES = 4
    """Backward: V, for p = 1 the sum of sign(v); once d is formed, a. Where a row is one number, FIRST and SECOND hold
    a and A'[d]/n."""


class Epilogue(IntEnum):
    """What becomes of a window sum."""

    STORE = 0
    MEAN = 1
    RSTD = 2
    COEFFICIENT = 3
    """Backward: a is stored, and d formed."""
