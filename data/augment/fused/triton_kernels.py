"""The compiled half of `gpu.py`; importing this imports Triton, which comes with torch for a GPU.

Four kernels take a batch from uint8 to normalised float32: the grey means that contrasts need, all
operations on single pixels, and the two passes of a blur. A program of a grid works on `BLOCK`
pixels of one sample; every sum has an order that only the image's size fixes.

`ints` (N, K+6) holds a sample's codes (K), then the place of its contrast in them (or -1), of its
blur (or END) and of END, flip, reach, and the row of its blur in `between` (or -1). `floats` (N,
K+T) holds its values (K) and its blur's taps (T).
"""

# ruff: noqa: ANN001, ANN201, ANN202 - these are programs of Triton: pointers, blocks and numbers of
# its own

import triton
import triton.language as tl

BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAY, SOLARIZE, BLUR, NOTHING, END = (
    tl.constexpr(number) for number in range(9)
)
HEADER = 6  # numbers after the codes
_LEVEL, _TINY = tl.constexpr(1 / 255), tl.constexpr(1e-8)
_RED, _GREEN, _BLUE = tl.constexpr(0.2989), tl.constexpr(0.587), tl.constexpr(0.114)


@triton.jit
def _clamp(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _luma(red, green, blue):
    return red * _RED + green * _GREEN + blue * _BLUE


@triton.jit
def _sextant(turned):
    wrapped = turned - 6.0 * tl.floor(turned * (1 / 6) + 0.5)
    return _clamp(2.0 - tl.abs(wrapped))


@triton.jit
def _point(code, value, mean, red, green, blue):
    """Apply one operation to pixels in [0,1]; `data.augment.ops` has the formulas."""
    if code == BRIGHTNESS or code == CONTRAST:
        offset = tl.where(code == CONTRAST, (1.0 - value) * mean, 0.0)
        red, green, blue = (
            _clamp(red * value + offset),
            _clamp(green * value + offset),
            _clamp(blue * value + offset),
        )
    elif code == SATURATION:
        offset = _luma(red, green, blue) * (1.0 - value)
        red, green, blue = (
            _clamp(red * value + offset),
            _clamp(green * value + offset),
            _clamp(blue * value + offset),
        )
    elif code == HUE:
        top = tl.maximum(tl.maximum(red, green), blue)
        chroma = top - tl.minimum(tl.minimum(red, green), blue)
        # grey pixels have no hue: any will do
        inverse = 1.0 / tl.maximum(chroma, _TINY)
        hue = tl.where(top == green, (blue - red) * inverse + 2.0, (red - green) * inverse + 4.0)
        hue = tl.where(top == red, (green - blue) * inverse, hue) + 6.0 * value
        red = top - chroma * _sextant(hue + 3.0)
        green = top - chroma * _sextant(hue + 1.0)
        blue = top - chroma * _sextant(hue - 1.0)
    elif code == GRAY:
        luma = _luma(red, green, blue)
        red, green, blue = luma, luma, luma
    elif code == SOLARIZE:
        red = tl.where(red >= value, 1.0 - red, red)
        green = tl.where(green >= value, 1.0 - green, green)
        blue = tl.where(blue >= value, 1.0 - blue, blue)
    return red, green, blue


@triton.jit
def _run(ints, floats, first, last, mean, red, green, blue):
    """Run the operations `first` to `last` of a program."""
    for k in range(first, last):
        red, green, blue = _point(tl.load(ints + k), tl.load(floats + k), mean, red, green, blue)
    return red, green, blue


@triton.jit
def _levels(images, pixel, inside, flip, width, by_channel, by_row, by_column):
    """Load pixels of a uint8 image as floats in [0,1], mirrored if `flip` is 1."""
    row, column = pixel // width, pixel % width
    column = tl.where(flip == 1, width - 1 - column, column)
    at = images + row * by_row + column * by_column
    red = tl.load(at, inside, 0).to(tl.float32) * _LEVEL
    green = tl.load(at + by_channel, inside, 0).to(tl.float32) * _LEVEL
    blue = tl.load(at + 2 * by_channel, inside, 0).to(tl.float32) * _LEVEL
    return red, green, blue


@triton.jit
def _store(out, plane, pixel, inside, red, green, blue, constants, normalised):
    """Store planes; `constants` holds scale and shift of the channels, used where `normalised`."""
    if normalised:
        red = red * tl.load(constants) - tl.load(constants + 3)
        green = green * tl.load(constants + 1) - tl.load(constants + 4)
        blue = blue * tl.load(constants + 2) - tl.load(constants + 5)
    tl.store(out + pixel, red, inside)
    tl.store(out + plane + pixel, green, inside)
    tl.store(out + 2 * plane + pixel, blue, inside)


@triton.jit
def grey_sums(
    images, ints, floats, sums, width, plane, by_image, by_channel, by_row, by_column,
    K: tl.constexpr, INTS: tl.constexpr, FLOATS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write each block's sum of the grey image that a contrast meets to `sums` (N, blocks)."""
    # int64: places in a large batch exceed 2**31
    sample, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ints += sample * INTS
    contrast = tl.load(ints + K)
    if contrast >= 0:
        pixel = block * BLOCK + tl.arange(0, BLOCK)
        inside = pixel < plane
        red, green, blue = _levels(
            images + sample * by_image, pixel, inside, 0, width, by_channel, by_row, by_column
        )
        red, green, blue = _run(ints, floats + sample * FLOATS, 0, contrast, 0.0, red, green, blue)
        grey = tl.where(inside, _luma(red, green, blue), 0.0)
        tl.store(sums + sample * tl.num_programs(1) + block, tl.sum(grey, 0))


@triton.jit
def points(
    images, ints, floats, sums, constants, out,
    width, plane, by_image, by_channel, by_row, by_column,
    K: tl.constexpr, INTS: tl.constexpr, FLOATS: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Run each program up to its blur or its end; normalise what is not blurred."""
    sample, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ints += sample * INTS
    number, part = tl.num_programs(1), tl.arange(0, BLOCKS)
    known = part < tl.where(tl.load(ints + K) >= 0, number, 0)
    mean = tl.sum(tl.load(sums + sample * number + part, known, 0.0), 0) / plane
    pixel = block * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < plane
    image, flip = images + sample * by_image, tl.load(ints + K + 3)
    red, green, blue = _levels(image, pixel, inside, flip, width, by_channel, by_row, by_column)
    last = tl.load(ints + K + 1)
    red, green, blue = _run(ints, floats + sample * FLOATS, 0, last, mean, red, green, blue)
    done = tl.load(ints + K + 5) < 0
    _store(out + sample * 3 * plane, plane, pixel, inside, red, green, blue, constants, done)


@triton.jit
def _taps(source, pixel, inside, place, length, step, taps, reach):
    """Sum a plane's pixels over their neighbours `step` apart, weighted; the border is repeated.

    `place` is a pixel's coordinate along the axis of `length`.
    """
    total = tl.load(source + pixel, inside, 0.0) * tl.load(taps)
    # the kernel is symmetric: one weight for both sides
    for distance in range(1, reach + 1):
        low = pixel - step * tl.minimum(distance, place)
        high = pixel + step * tl.minimum(distance, length - 1 - place)
        both = tl.load(source + low, inside, 0.0) + tl.load(source + high, inside, 0.0)
        total += both * tl.load(taps + distance)
    return total


@triton.jit
def blur_rows(
    ints, floats, out, between, width, plane,
    K: tl.constexpr, INTS: tl.constexpr, FLOATS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Blur the rows of the blurred samples, `out` (N,3,H,W) to `between` (M,3,H,W)."""
    sample, block, channel = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    ints += sample * INTS
    row = tl.load(ints + K + 5).to(tl.int64)
    if row >= 0:
        pixel = block * BLOCK + tl.arange(0, BLOCK)
        inside = pixel < plane
        source = out + (sample * 3 + channel) * plane
        taps = floats + sample * FLOATS + K
        total = _taps(source, pixel, inside, pixel % width, width, 1, taps, tl.load(ints + K + 4))
        tl.store(between + (row * 3 + channel) * plane + pixel, total, inside)


@triton.jit
def blur_columns(
    ints, floats, between, constants, out, width, plane,
    K: tl.constexpr, INTS: tl.constexpr, FLOATS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Blur the columns of `between` (M,3,H,W), run the rest, normalise into `out`."""
    sample, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ints += sample * INTS
    floats += sample * FLOATS
    row = tl.load(ints + K + 5).to(tl.int64)
    if row >= 0:
        pixel = block * BLOCK + tl.arange(0, BLOCK)
        inside = pixel < plane
        source = between + row * 3 * plane
        y, height, reach = pixel // width, plane // width, tl.load(ints + K + 4)
        taps = floats + K
        red = _taps(source, pixel, inside, y, height, width, taps, reach)
        green = _taps(source + plane, pixel, inside, y, height, width, taps, reach)
        blue = _taps(source + 2 * plane, pixel, inside, y, height, width, taps, reach)
        first, last = tl.load(ints + K + 1) + 1, tl.load(ints + K + 2)
        red, green, blue = _run(ints, floats, first, last, 0.0, red, green, blue)
        _store(out + sample * 3 * plane, plane, pixel, inside, red, green, blue, constants, True)
