"""The compiled half of `data.augment.fused.cpu`; importing this imports numba, an optional package.

A block of rows is loaded, taken through all operations up to the next one that needs the whole
image (the mean of a contrast, the neighbours of a blur) and stored, so that it stays in the
first-level cache. Every sum has an order that only the image's size fixes. Red, green and blue (n,)
are the pixels of a block in [0,1].

Only `augment` is kept on disk, and numba looks for changes in this file alone: constants of other
modules have to come as arguments.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import numba
import numpy as np

Array: TypeAlias = np.ndarray

# What a sample's program is made of; those of ColorJitter have their numbers in JITTER_OPS.
BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAY, SOLARIZE, BLUR, NOTHING, END = range(9)
OFFSET, VIVID = 9, 10  # brightness by a sum, saturation of HSV: not in Triton's kernels
PAIR = 2  # a pass adds so many taps of a blur on each side

# Where a block comes from: the uint8 image, what was kept of it, or of the output, or blurred along
# its rows.
_LEVELS, _KEPT, _OUTPUT, _BLURRED = range(4)
# Of fast-math only fused multiply-add, which changes no order.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
_SIGNATURE = (
    "void(uint8[:,::1], boolean, boolean[::1], int64[:,::1], float32[:,::1], float32[:,::1], "
    "int64[::1], float32[::1], float32[::1], float32[:,:,:,::1], int64, int64)"
)
_BLOCK = 2048  # pixels of three floats, which a first-level cache holds
_ZERO, _ONE, _TWO, _THREE, _FOUR, _SIX = (np.float32(value) for value in (0, 1, 2, 3, 4, 6))
_LEVEL, _SIXTH, _TINY = np.float32(1 / 255), np.float32(1 / 6), np.float32(1e-8)
_ROUNDING = np.float32(1.5 * 2**23)  # adding and subtracting it rounds to an integer
_RED, _GREEN, _BLUE = np.float32(0.2989), np.float32(0.587), np.float32(0.114)
_inner = numba.njit(**_OPTIONS)


def augment(
    levels: Array,
    interleaved: bool,
    flips: Array,
    codes: Array,
    values: Array,
    taps: Array,
    reaches: Array,
    scale: Array,
    shift: Array,
    out: Array,
    start: int,
    stop: int,
) -> None:
    """Run the programs of samples `start` to `stop`, from `levels` (N,3HW) to `out` (N,3,H,W)."""
    height, width = out.shape[2], out.shape[3]
    rows = max(1, _BLOCK // width)
    block = np.empty((3, rows * width), dtype=np.float32)
    sums = np.empty(rows * width, dtype=np.float32)
    margin = taps.shape[1] - 1
    padded = np.empty(width + 2 * margin, dtype=np.float32)
    # Kept or blurred rows, with margins for the blur; the output, which leaves the caches, is
    # written once.
    rest = np.empty((3, height + 2 * margin, width), dtype=np.float32)
    for i in range(start, stop):
        image = levels[i], interleaved, flips[i]
        program = codes[i], values[i], taps[i], reaches[i]
        _run(image, program, (scale, shift), (block, sums, padded, rest), out[i])


@_inner
def _run(
    image: tuple[Array, bool, bool],
    program: tuple[Array, Array, Array, int],
    constants: tuple[Array, Array],
    buffers: tuple[Array, Array, Array, Array],
    out: Array,
) -> None:
    """Run the program of one sample in passes: each ends at a contrast, a blur or the end."""
    levels, interleaved, flip = image
    codes, values, taps, reach = program
    scale, shift = constants
    block, sums, padded, rest = buffers
    height, width = out.shape[1], out.shape[2]
    rows, margin = block.shape[1] // width, len(taps) - 1
    first, source, mean, mean_known = 0, _LEVELS, _ZERO, False
    while True:
        last = first + 1 if mean_known else first
        while codes[last] not in (CONTRAST, BLUR, END):
            last += 1
        goal = codes[last]
        # a sum for each place of a block: one float32 sum of a whole image would be coarse
        sums[:] = _ZERO
        for top in range(0, height, rows):
            bottom = min(height, top + rows)
            n = (bottom - top) * width
            red, green, blue = block[0, :n], block[1, :n], block[2, :n]
            if source == _LEVELS:
                _load(levels, interleaved, flip, height, width, top, bottom, block)
            elif source == _KEPT:
                _recall(rest, margin + top, n, block)
            elif source == _OUTPUT:
                _recall(out, top, n, block)
            else:
                _blur_columns(rest, top, bottom, taps, reach, margin, block)
            for k in range(first, last):
                _point(codes[k], values[k], mean, red, green, blue)
            if goal == CONTRAST:
                _add_luma(sums, red, green, blue)
                if source == _BLURRED:  # later rows need those of `rest`
                    _store(block, n, out, top)
                elif last > first:
                    _store(block, n, rest, margin + top)
            elif goal == BLUR:
                _blur_rows(block, top, bottom, taps, reach, margin, padded, rest)
            else:
                _normalise(block, top, bottom, width, scale, shift, out)
        if goal == END:
            break
        mean_known = goal == CONTRAST
        if not mean_known:
            first, source = last + 1, _BLURRED
            continue
        mean = np.float32(_total(sums) / (height * width))
        if source == _BLURRED:
            source = _OUTPUT
        elif last > first:
            source = _KEPT
        first = last


@_inner
def _clamp(value: np.float32) -> np.float32:
    return min(max(value, _ZERO), _ONE)


@_inner
def _load(
    levels: Array,
    interleaved: bool,
    flip: bool,
    height: int,
    width: int,
    top: int,
    bottom: int,
    block: Array,
) -> None:
    plane = height * width
    for y in range(top, bottom):
        at = (y - top) * width
        part = block[:, at : at + width]
        red, green, blue = part[0], part[1], part[2]
        if interleaved:
            row = levels[3 * y * width : 3 * (y + 1) * width]
            if flip:
                for x in range(width):
                    red[width - 1 - x] = np.float32(row[3 * x]) * _LEVEL
                    green[width - 1 - x] = np.float32(row[3 * x + 1]) * _LEVEL
                    blue[width - 1 - x] = np.float32(row[3 * x + 2]) * _LEVEL
            else:
                for x in range(width):
                    red[x] = np.float32(row[3 * x]) * _LEVEL
                    green[x] = np.float32(row[3 * x + 1]) * _LEVEL
                    blue[x] = np.float32(row[3 * x + 2]) * _LEVEL
        else:
            for c in range(3):
                row = levels[c * plane + y * width : c * plane + (y + 1) * width]
                target = block[c, at : at + width]
                if flip:
                    for x in range(width):
                        target[width - 1 - x] = np.float32(row[x]) * _LEVEL
                else:
                    for x in range(width):
                        target[x] = np.float32(row[x]) * _LEVEL


@_inner
def _recall(image: Array, row: int, n: int, block: Array) -> None:
    rows = n // image.shape[2]
    for c in range(3):
        _copy(image[c, row : row + rows].reshape(n), block[c, :n])


@_inner
def _store(block: Array, n: int, image: Array, row: int) -> None:
    rows = n // image.shape[2]
    for c in range(3):
        _copy(block[c, :n], image[c, row : row + rows].reshape(n))


@_inner
def _normalise(
    block: Array, top: int, bottom: int, width: int, scale: Array, shift: Array, image: Array
) -> None:
    n = (bottom - top) * width
    for c in range(3):
        kept, target = block[c, :n], image[c, top:bottom].reshape(n)
        factor, offset = scale[c], shift[c]
        for x in range(n):
            target[x] = kept[x] * factor - offset


@_inner
def _add_luma(sums: Array, red: Array, green: Array, blue: Array) -> None:
    for x in range(len(red)):
        sums[x] += red[x] * _RED + green[x] * _GREEN + blue[x] * _BLUE


@_inner
def _total(sums: Array) -> float:
    total = 0.0
    for x in range(len(sums)):
        total += sums[x]
    return total


@_inner
def _point(
    code: int, value: np.float32, mean: np.float32, red: Array, green: Array, blue: Array
) -> None:
    if code == BRIGHTNESS:
        _line(value, _ZERO, red, green, blue)
    elif code == CONTRAST:
        _line(value, (_ONE - value) * mean, red, green, blue)
    elif code == SATURATION:
        _saturate(value, red, green, blue)
    elif code == HUE:
        _turn(value, _ONE, red, green, blue)
    elif code == GRAY:
        _saturate(_ZERO, red, green, blue)
    elif code == OFFSET:
        _line(_ONE, value, red, green, blue)
    elif code == VIVID:
        _turn(_ZERO, value, red, green, blue)
    elif code == SOLARIZE:
        for channel in (red, green, blue):
            for x in range(len(red)):
                level = channel[x]
                channel[x] = _ONE - level if level >= value else level


@_inner
def _line(factor: np.float32, offset: np.float32, red: Array, green: Array, blue: Array) -> None:
    for channel in (red, green, blue):
        for x in range(len(red)):
            channel[x] = _clamp(channel[x] * factor + offset)


@_inner
def _saturate(factor: np.float32, red: Array, green: Array, blue: Array) -> None:
    rest = _ONE - factor
    for x in range(len(red)):
        r, g, b = red[x], green[x], blue[x]
        luma = (r * _RED + g * _GREEN + b * _BLUE) * rest
        red[x] = _clamp(r * factor + luma)
        green[x] = _clamp(g * factor + luma)
        blue[x] = _clamp(b * factor + luma)


@_inner
def _turn(turns: np.float32, factor: np.float32, red: Array, green: Array, blue: Array) -> None:
    """Turn the hue, and multiply the S, of HSV; `data.augment.ops.adjust_hue` has the formula."""
    for x in range(len(red)):
        r, g, b = red[x], green[x], blue[x]
        value = max(max(r, g), b)
        chroma = value - min(min(r, g), b)
        inverse = _ONE / max(chroma, _TINY)
        hue = (r - g) * inverse + _FOUR
        hue = (b - r) * inverse + _TWO if value == g else hue
        hue = (g - b) * inverse if value == r else hue
        hue += _SIX * turns
        chroma = min(chroma * factor, value)
        red[x] = value - chroma * _sextant(hue + _THREE)
        green[x] = value - chroma * _sextant(hue + _ONE)
        blue[x] = value - chroma * _sextant(hue - _ONE)


@_inner
def _sextant(turned: np.float32) -> np.float32:
    # adding and subtracting a large number rounds, and unlike a call it is vectorised
    wrapped = turned - _SIX * ((turned * _SIXTH + _ROUNDING) - _ROUNDING)
    return _clamp(_TWO - abs(wrapped))


@_inner
def _blur_rows(
    block: Array,
    top: int,
    bottom: int,
    taps: Array,
    reach: int,
    margin: int,
    padded: Array,
    blurred: Array,
) -> None:
    """Blur the rows of `block` into `blurred` (3,H+2*margin,W), outer rows repeated."""
    width, height = blurred.shape[2], blurred.shape[1] - 2 * margin
    for c in range(3):
        for y in range(bottom - top):
            _pad(block[c, y * width : (y + 1) * width], reach, padded)
            _convolve(padded, reach, 1, taps, reach, blurred[c, margin + top + y])
        for d in range(reach):
            if top == 0:
                _copy(blurred[c, margin], blurred[c, margin - 1 - d])
            if bottom == height:
                _copy(blurred[c, margin + height - 1], blurred[c, margin + height + d])


@_inner
def _pad(row: Array, reach: int, padded: Array) -> None:
    width = len(row)
    for x in range(reach):
        padded[x] = row[0]
        padded[reach + width + x] = row[width - 1]
    _copy(row, padded[reach : reach + width])


@_inner
def _copy(source: Array, target: Array) -> None:
    for x in range(len(target)):
        target[x] = source[x]


@_inner
def _blur_columns(
    blurred: Array, top: int, bottom: int, taps: Array, reach: int, margin: int, block: Array
) -> None:
    width = blurred.shape[2]
    for c in range(3):
        target = block[c, : (bottom - top) * width]
        _convolve(blurred[c].reshape(-1), (margin + top) * width, width, taps, reach, target)


@_inner
def _convolve(source: Array, start: int, step: int, taps: Array, reach: int, target: Array) -> None:
    """Write the symmetric convolution of `source`, from `start` on, to `target`."""
    n = len(target)
    centre, t0, t1, t2 = source[start : start + n], taps[0], taps[1], taps[2]
    a, b = source[start - step : start - step + n], source[start + step : start + step + n]
    c, d = (
        source[start - 2 * step : start - 2 * step + n],
        source[start + 2 * step : start + 2 * step + n],
    )
    for x in range(n):
        target[x] = centre[x] * t0 + (a[x] + b[x]) * t1 + (c[x] + d[x]) * t2
    # two taps a pass: half as many reads and writes of the target
    for near in range(3, reach + 1, 2):
        low, high, t1, t2 = start - near * step, start + near * step, taps[near], taps[near + 1]
        a, b = source[low : low + n], source[high : high + n]
        c, d = source[low - step : low - step + n], source[high + step : high + step + n]
        for x in range(n):
            target[x] += (a[x] + b[x]) * t1 + (c[x] + d[x]) * t2


def compiled(cache: bool) -> Callable[..., None]:
    """Compile the kernel, or with `cache` load it from numba's folder and put it there."""
    return numba.njit(_SIGNATURE, cache=cache, **_OPTIONS)(augment)
