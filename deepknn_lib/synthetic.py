"""A procedural, dermoscopy-like stand-in for the Skin-7 data of the paper: synthetic images, no patients.

Seven classes with Skin-7's names and long-tailed proportions, several *looks* per class (the table ``looks.LOOKS``),
several *views* per lesion, and nuisances (hair, vignette, ruler, lighting, blur, noise) that are drawn
without regard to the class.  The looks of different classes overlap on purpose, so that colour alone does not
name the class.  Nothing measured on these images says anything about skin disease.

Every number comes from ``Generator.random`` of a PCG64 seeded by (seed, class, lesion, view); all shapes have
smooth edges and the arithmetic is float64, so the last bit of a platform's ``tanh`` does not reach the bytes.
"""
from __future__ import annotations

from dataclasses import fields
from typing import NamedTuple

import numpy as np

from deepknn_lib.looks import (
    CLASS_NAMES,
    FIRST,
    MIN_PER_CLASS,
    SKIN7_COUNTS,
    VIEW_SHARES,
    Draws,
    Look,
    attributes,
    generator,
    pick,
)

_HAIRS, _SPOTS = 5, 6
_BATCH = 8                    # images drawn at once: few enough for the cache


class Lesions(NamedTuple):
    """A set of synthetic images; row i of every field belongs to image i."""

    images: np.ndarray         # uint8 (N, 3, size, size), RGB
    labels: np.ndarray         # int64 (N,), index into CLASS_NAMES
    ids: np.ndarray            # str (N,), "<lesion id>_<view>"
    groups: np.ndarray         # str (N,), lesion id: split by this


class _Place(NamedTuple):
    """Where a batch of images looks: lesion coordinates, also as an affine map of the pixel grid."""

    u: np.ndarray              # (batch, s, s)
    v: np.ndarray
    affine: tuple              # two rows of three (batch,) coefficients
    grid: np.ndarray           # (s,), pixel centres in -1..1


def _class_counts(n_images):
    """Images per class (7,): Skin-7's shares by largest remainder, each at least MIN_PER_CLASS."""
    least = MIN_PER_CLASS * len(CLASS_NAMES)
    if not _is_int(n_images) or n_images < least:
        raise ValueError(f"n_images must be an integer of at least {least} ({MIN_PER_CLASS} for each of "
                         f"{len(CLASS_NAMES)} classes), got {n_images!r}: ask for more images")
    skin7 = np.array([SKIN7_COUNTS[name] for name in CLASS_NAMES], dtype=np.int64)
    counts, free = np.full(len(skin7), MIN_PER_CLASS, dtype=np.int64), np.ones(len(skin7), dtype=bool)
    while True:                # classes below the minimum keep it; the others share what is left
        left, weight = int(n_images) - int(counts[~free].sum()), int(skin7[free].sum())
        whole, remainder = np.divmod(left * skin7[free], weight)
        whole[np.argsort(-remainder, kind="stable")[:left - int(whole.sum())]] += 1
        if (whole >= MIN_PER_CLASS).all():
            counts[free] = whole
            return counts
        free[np.flatnonzero(free)[whole < MIN_PER_CLASS]] = False


def _is_int(value):
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _step(x):
    """Smooth step from 0 to 1 over about -2 <= x <= 2."""
    return 0.5 + 0.5 * np.tanh(x)


def _waves(place, draws, count, low, high):
    """Smooth noise of unit variance (batch, s, s): plane waves of periods in low..high (half image widths).

    On a pixel grid cos(a x + b y) is a matrix of rank two, so that no cosine is taken per pixel.
    """
    phase, k = draws.uniform(0, 2 * np.pi, count), 2 * np.pi / draws.uniform(low, high, count)
    angle = (np.arange(count) + draws.uniform(0, 1, count)) * np.pi / count   # spread out, against a grain
    kx, ky = k * np.cos(angle), k * np.sin(angle)
    along_x, along_y, constant = (
        kx * place.affine[0][i][:, None] + ky * place.affine[1][i][:, None] for i in range(3))
    x = along_x[:, :, None] * place.grid + (constant + phase)[:, :, None]
    y = along_y[:, :, None] * place.grid
    rows, columns = np.concatenate([np.cos(y), -np.sin(y)], 1), np.concatenate([np.cos(x), np.sin(x)], 1)
    return np.matmul(rows.transpose(0, 2, 1), columns) * np.sqrt(2.0 / count)


def _px(a):
    return a[:, None, None]


def _mix(image, colour, weight):
    """Move image (batch, 3, s, s), in place, towards colour (batch, 3) or (3,) by weight (batch, s, s)."""
    for channel in range(3):
        plane = image[:, channel]
        plane += (np.reshape(colour[..., channel], (-1, 1, 1)) - plane) * weight


def _lesion(place, names, draws):
    """Skin and lesion (batch, 3, s, s), 0-255, in the lesion's own coordinates u, v."""
    u, v = place.u, place.v
    a = attributes(names, draws)
    look = {f.name: _px(a[:, i]) for i, f in enumerate(fields(Look)[FIRST:])}
    main, second, spot = a[:, -9:-6], a[:, -6:-3], a[:, -3:]
    tone = draws.uniform()[:, None]
    skin = np.array([232., 188., 172.]) - tone * np.array([36., 46., 56.]) + 5 * draws.normal(3)
    mottle = 1 + 0.02 * _waves(place, draws, 5, 0.5, 1.4) + 0.01 * _waves(place, draws, 9, 0.10, 0.25)
    image = np.broadcast_to(skin[:, :, None, None], (*skin.shape, *u.shape[1:])) * mottle[:, None]

    # Border: a stretched circle plus smooth noise, and two harmonics that make it lopsided where irregular.
    x, y = u * (1 + look["elong"]), v / (1 + look["elong"])
    r = np.sqrt(x * x + y * y + 1e-4)
    c, s, lopsided = x / r, y / r, draws.normal(4)
    wobble = (_px(lopsided[:, 0]) * (c * c - s * s) + _px(lopsided[:, 1]) * (2 * c * s)
              + _px(lopsided[:, 2]) * (c * c - 3 * s * s) * c + _px(lopsided[:, 3]) * (3 * c * c - s * s) * s)
    rough = _waves(place, draws, 8, 0.3, 0.8)
    border = look["size"] * np.maximum(1 + look["irreg"] * (0.5 * wobble + 0.9 * rough), 0.3)
    rho = r / border
    inside = _step((border - r) / look["soft"])

    low = _waves(place, draws, 5, 0.35, 0.9)
    tilt = draws.uniform(0, 2 * np.pi)
    along = (_px(np.cos(tilt)) * u + _px(np.sin(tilt)) * v) / look["size"]
    weight = (look["radial"] * np.exp(-(rho / 0.55) ** 2)
              + look["side"] * _step(3.0 * along - 0.4 + 0.5 * low)
              + look["blotch"] * _step(2.0 * low - 0.6))
    body = np.repeat(main[:, :, None, None], u[0].size, axis=3).reshape(image.shape)
    _mix(body, second, np.minimum(weight, 1.0))

    # One warped hexagonal lattice gives both the network (its walls) and the globules (its cells).
    warp = 0.05 * _waves(place, draws, 3, 0.5, 0.9), 0.05 * _waves(place, draws, 3, 0.5, 0.9)
    turn, period, shift = draws.uniform(0, np.pi), draws.uniform(0.22, 0.30), draws.uniform(0, 2 * np.pi, 3)
    lattice = 0.0
    for j in range(3):
        angle = turn + j * np.pi / 3
        k = 2 * np.pi / period
        wave = _px(k * np.cos(angle)) * (u + warp[0]) + _px(k * np.sin(angle)) * (v + warp[1])
        lattice = lattice + np.cos(wave + (_px(shift[:, j]) if j < 2 else _px(shift[:, 1] - shift[:, 0])))
    _mix(body, spot, 0.9 * np.minimum(look["glob"], 1) * _step(2.5 * lattice - 1.6))
    ridge = np.cos(_px(2 * np.pi / draws.uniform(0.20, 0.28)) * (along * look["size"] + 0.9 * warp[0]))
    shade = (1 - 0.45 * look["net"] * _step(-1.6 * lattice - 0.8) - 0.18 * look["ridge"] * (1 + ridge)
             - 0.40 * look["rim"] * np.exp(-((rho - 0.85) / 0.16) ** 2))
    body *= np.maximum(shade, 0.2)[:, None]
    vessel = np.exp(-(_waves(place, draws, 5, 0.3, 0.6) / 0.22) ** 2)
    _mix(body, np.array([176., 44., 52.]), 0.75 * np.minimum(look["vessel"], 1) * vessel)
    flakes = _step(1.6 * _waves(place, draws, 10, 0.12, 0.26) - 1.0)
    _mix(body, np.array([240., 226., 210.]), 0.75 * np.minimum(look["scale"], 1) * flakes)
    where, angle = draws.uniform(count=_SPOTS), draws.uniform(0, 2 * np.pi, _SPOTS)
    grow, cover = draws.uniform(0.75, 1.3, _SPOTS), 0.0
    for j in range(_SPOTS):
        distance = 0.85 * np.sqrt(where[:, j]) * a[:, 0]
        du, dv = u - _px(distance * np.cos(angle[:, j])), v - _px(distance * np.sin(angle[:, j]))
        cover = cover + np.exp(-((du * du + dv * dv) / (look["spot_r"] * _px(grow[:, j])) ** 2) ** 2)
    _mix(body, spot, np.minimum(look["spots"], 1) * np.minimum(cover, 1.0))
    tint = np.sqrt(skin / 214.0)[:, :, None, None] * mottle[:, None]
    return image + (body * tint - image) * inside[:, None]


def _camera(image, x, y, draws, noise):
    """What differs between two photographs of a lesion, besides its position; blind to the class."""
    there, number = draws.uniform() < 0.25, draws.uniform(0, _HAIRS)
    turn, bend = draws.uniform(0, 2 * np.pi), draws.normal(2 * _HAIRS)
    centre = draws.uniform(-0.95, 0.95, _HAIRS)
    rows = np.flatnonzero(there)
    cover = 0.0
    for j in range(_HAIRS):    # parabolas; the hairs of one image run about the same way
        along, across = _turned(x[rows], y[rows], turn[rows] + 0.3 * bend[rows, 2 * j])
        gap = across - _px(centre[rows, j]) - 0.25 * _px(bend[rows, 2 * j + 1]) * along * along
        cover = cover + 0.8 * _px(number[rows] > j) * np.exp(-(gap / 0.027) ** 2)
    hairy = image[rows]
    _mix(hairy, np.array([60., 44., 38.]), np.minimum(cover, 0.8))
    image[rows] = hairy

    there, side, offset = draws.uniform() < 0.12, draws.uniform(), draws.uniform(0, 2 * np.pi)
    rows = np.flatnonzero(there)
    along, across = _turned(x[rows], y[rows], np.pi / 2 * np.floor(4 * side[rows]))
    ticks = _step(6 * np.cos(along * 22 + _px(offset[rows])) - 4) * _step(25 * (across - 0.82))
    ruled = image[rows]
    _mix(ruled, np.array([40., 40., 44.]), 0.8 * ticks)
    image[rows] = ruled

    # Light: exposure, white balance, a slope over the field, and the black corner of the dermoscope.
    gain = draws.uniform(0.86, 1.10)[:, None] * (1 + 0.025 * draws.normal(3))
    slope = 0.07 * draws.normal(2)
    image = image * (gain[:, :, None, None] * (1 + _px(slope[:, 0]) * x + _px(slope[:, 1]) * y)[:, None])
    dark, edge = draws.uniform() < 0.3, draws.uniform(1.02, 1.22)
    radius = np.sqrt(x * x + y * y)
    image = image * (1 - _px(0.93 * dark) * _step(14 * (radius - _px(edge))))[:, None]
    blur = draws.uniform(0, 0.22)[:, None, None, None]
    for _ in range(2):         # once along each axis; edges repeat
        padded = np.concatenate([image[:, :, :1], image, image[:, :, -1:]], axis=2)
        image = image + blur * (padded[:, :, :-2] + padded[:, :, 2:] - 2 * image)
        image = image.swapaxes(2, 3)
    return image + draws.uniform(1.5, 7.0)[:, None, None, None] * noise


def _turned(x, y, angle):
    return _px(np.cos(angle)) * x + _px(np.sin(angle)) * y, _px(np.cos(angle)) * y - _px(np.sin(angle)) * x


def _render(names, lesion_uniforms, view_uniforms, noise):
    """Images uint8 (batch, 3, size, size) of one view each."""
    view, grid = Draws(view_uniforms), (np.arange(noise.shape[-1]) + 0.5) / noise.shape[-1] * 2 - 1
    flip, zoom, shift = 1 - 2 * (view.uniform() < 0.3), view.uniform(0.87, 1.15), 0.08 * view.normal(2)
    turn = view.uniform(-0.6, 0.6)
    c, s = np.cos(turn) / zoom, np.sin(turn) / zoom
    affine = (flip * c, flip * s, -shift[:, 0]), (-s, c, -shift[:, 1])   # u, v = affine of (x, y, 1)
    x, y = (np.broadcast_to(g, (len(names), *g.shape)) for g in np.meshgrid(grid, grid))
    u, v = (_px(row[0]) * x + _px(row[1]) * y + _px(row[2]) for row in affine)
    image = _camera(_lesion(_Place(u, v, affine, grid), names, Draws(lesion_uniforms)), x, y, view, noise)
    return np.rint(np.clip(image, 0, 255)).astype(np.uint8)


def make_lesions(n_images=3000, size=48, seed=0):
    """Draw a synthetic set of dermoscopy-like images of lesions.

    Parameters
    ----------
    n_images : int
        At least 56.  Class counts follow Skin-7's shares by largest remainder, each at least 8.
    size : int
        Image side in pixels, 16 to 512; texture needs about 40.
    seed : int
        Non-negative.  The same arguments give the same bytes.

    Returns
    -------
    Lesions
        ``images`` uint8 (N, 3, size, size), ``labels`` int64 (N,), ``ids`` and ``groups`` str (N,).  Images
        of one lesion stand next to each other; the order of lesions is random.

    Raises
    ------
    ValueError
        If an argument is not an integer or out of range.
    """
    counts = _class_counts(n_images)
    if not _is_int(size) or not 16 <= size <= 512:
        raise ValueError(f"size must be an integer from 16 to 512 pixels, got {size!r}: 48 is the default")
    if not _is_int(seed) or seed < 0:
        raise ValueError(f"seed must be a non-negative integer, got {seed!r}: use for example seed=0")
    size, seed = int(size), int(seed)

    lesions = []               # (sort key, class, lesion of the class, number of views)
    for label, left in enumerate(counts):
        rank = 0
        while left > 0:
            key, u = generator(seed, label, rank, 0).random(2)
            views = min(1 + pick(VIEW_SHARES, u), int(left))
            lesions.append((key, label, rank, views))
            left, rank = left - views, rank + 1
    lesions.sort()
    shots = [(number, label, rank, view) for number, (_, label, rank, views) in enumerate(lesions)
             for view in range(1, views + 1)]
    images = np.empty((len(shots), 3, size, size), dtype=np.uint8)
    for start in range(0, len(shots), _BATCH):
        batch = shots[start:start + _BATCH]
        names, lesion_u, view_u, noise = [], [], [], []
        for _, label, rank, view in batch:
            names.append(CLASS_NAMES[label])
            lesion_u.append(generator(seed, label, rank, 0).random(2 + 400)[2:])
            of_view = generator(seed, label, rank, view)
            view_u.append(of_view.random(120))
            grain = of_view.random((2, 3, size, size))
            noise.append((grain[0] + grain[1] - 1) * np.sqrt(6))
        images[start:start + _BATCH] = _render(names, np.array(lesion_u), np.array(view_u), np.array(noise))
    groups = np.array([f"lesion_{number:05d}" for number, _, _, _ in shots])
    ids = np.array([f"lesion_{number:05d}_{view}" for number, _, _, view in shots])
    return Lesions(images, np.array([label for _, label, _, _ in shots], dtype=np.int64), ids, groups)
