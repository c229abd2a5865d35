"""A procedural, dermoscopy-like stand-in for Skin-7: 3,000 synthetic images, no patients.

The set has Skin-7's seven classes in its long-tailed proportions, several looks per class (the table `looks.json`),
several views per lesion, and nuisances (hair, vignette, ruler, lighting, blur, noise) that do not depend on the class.
The looks of different classes overlap, so that colour alone does not name the class. Nothing measured on these images
says anything about skin disease.

Every number comes from `Generator.random` of a PCG64 seeded by (0, class, lesion, view). All shapes have smooth edges
and the arithmetic is float64, so the last bit of a platform's `tanh` does not reach the bytes.
"""

import json
from collections import namedtuple
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

VIEW_SHARES = (0.738, 0.190, 0.066, 0.006)  # lesions with 1, 2, 3, 4 images, about as in HAM10000
AMBIGUOUS_SHARE = 0.30  # share of lesions drawn part of the way towards a look of a confusable class
AMBIGUOUS_PULL = (0.25, 0.65)  # how far they go, uniformly; 1 would be that look itself
HAIRS, SPOTS, BATCH = 5, 6, 8  # most hairs and spots of an image; images drawn at once
LOOKS_FILE = Path(__file__).with_name("looks.json")
_TABLE = json.loads(LOOKS_FILE.read_text(encoding="utf-8"))
_CLASSES, _ABOUT = _TABLE["classes"], _TABLE["attributes"]


Look = namedtuple("Look", "name share vector")  # the share of lesions; 15 attributes and three colours


def _look(look: dict) -> Look:
    colours = [value for part in ("main", "second", "spot") for value in _TABLE["colours"][look[part]]]
    numbers = [look.get(name, about["default"]) for name, about in _ABOUT.items()]
    return Look(look["name"], look["share"], np.array([*numbers, *colours], dtype=np.float64))


SPREAD = np.array([about["spread"] for about in _ABOUT.values()])  # of an attribute within a look
CLASS_NAMES = tuple(_CLASSES)
CLASS_LONG_NAMES = {name: about["long_name"] for name, about in _CLASSES.items()}
CONFUSABLE = {name: about["confusable"] for name, about in _CLASSES.items()}
LOOKS = {name: tuple(map(_look, about["looks"])) for name, about in _CLASSES.items()}


def describe() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels int64 (N,), ids `<group>_<view>` and groups str (N,); images of a lesion are neighbours."""
    labels, lesions, views = np.array([(label, lesion, view) for lesion, label, _, view in _plan()]).T
    groups = np.array([f"lesion_{lesion:05d}" for lesion in lesions])
    return labels, np.array([f"{group}_{view}" for group, view in zip(groups, views, strict=True)]), groups


def draw(size: int) -> Iterator[np.ndarray]:
    """The images in order, a few at a time, the same bytes every time: uint8 (n, 3, size, size), RGB."""
    if not 16 <= size <= 512:
        raise ValueError(f"the lesions are drawn at 16 to 512 pixels, got {size}: 48 is the default")
    shots = _plan()
    for start in range(0, len(shots), BATCH):
        chosen = shots[start : start + BATCH]
        of_lesion = np.array([_generator(label, rank, 0).random(2 + 400)[2:] for _, label, rank, _ in chosen])
        views = [_generator(*key) for _, *key in chosen]
        of_view = np.array([view.random(120) for view in views])
        grain = np.array([view.random((2, 3, size, size)) for view in views]).sum(1)
        names = [CLASS_NAMES[label] for _, label, _, _ in chosen]
        yield _render(names, of_lesion, of_view, (grain - 1) * np.sqrt(6))


def _plan() -> list[tuple[int, int, int, int]]:
    """Of each image its lesion's number in the set, its class, the lesion's rank in the class and the view."""
    lesions = []  # (sort key, class, lesion of the class, number of views)
    for label, about in enumerate(_CLASSES.values()):
        rank, left = 0, about["images"]
        while left > 0:
            key, u = _generator(label, rank, 0).random(2)
            views = min(1 + _pick(VIEW_SHARES, u), left)
            lesions.append((key, label, rank, views))
            left, rank = left - views, rank + 1
    numbered = enumerate(sorted(lesions))
    return [(n, label, rank, view) for n, (_, label, rank, views) in numbered for view in range(1, views + 1)]


def _generator(*key):
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((0, *key))))


def _pick(shares, u):
    """Index drawn with the given shares by the uniform u."""
    return min(int((np.cumsum(shares) / np.sum(shares) <= u).sum()), len(shares) - 1)


class _Draws:
    """Hands out the columns of a (batch, n) array of uniforms, in order: (batch, count) or (batch,)."""

    def __init__(self, uniforms):
        self.uniforms, self.used = uniforms, 0

    def uniform(self, low=0.0, high=1.0, count=None):
        """The next column, or the next `count`, stretched to low..high."""
        start, self.used = self.used, self.used + (count or 1)
        block = low + (high - low) * self.uniforms[:, start : self.used]
        return block if count else block[:, 0]

    def normal(self, count):
        """Nearly normal, bounded by +-2 sqrt(3): the sum of four uniforms, which needs no log or cos."""
        four = self.uniform(count=4 * count).reshape(-1, 4, count)
        return (four[:, 0] + four[:, 1] + four[:, 2] + four[:, 3] - 2.0) * np.sqrt(3.0)


def _attributes(names, draws):
    """Attribute vectors (batch, 24) of lesions whose class names are given."""
    chosen, ambiguous, which, other_look = draws.uniform(count=4).T
    pull = draws.uniform(*AMBIGUOUS_PULL) * (ambiguous < AMBIGUOUS_SHARE)
    rows = []
    for i, name in enumerate(names):
        own = LOOKS[name][_pick([look.share for look in LOOKS[name]], chosen[i])]
        other = LOOKS[CONFUSABLE[name][int(which[i] * len(CONFUSABLE[name]))]]
        other = other[_pick([look.share for look in other], other_look[i])]
        rows.append((1.0 - pull[i]) * own.vector + pull[i] * other.vector)
    rows, n = np.array(rows), len(SPREAD)
    rows[:, :n] = np.maximum(rows[:, :n] + SPREAD * draws.normal(n), 0.0)
    rows[:, n:] += 12.0 * np.repeat(draws.normal(3), 3, axis=1) + 5.0 * draws.normal(9)
    rows[:, 0] = np.clip(rows[:, 0], 0.22, 0.8)
    rows[:, 3], rows[:, 13] = np.maximum(rows[:, 3], 0.03), np.maximum(rows[:, 13], 0.035)
    return rows


def _render(names, lesion_uniforms, view_uniforms, noise):
    """Images uint8 (batch, 3, size, size) of one view each."""
    view, grid = _Draws(view_uniforms), (np.arange(noise.shape[-1]) + 0.5) / noise.shape[-1] * 2 - 1
    flip, zoom, shift = 1 - 2 * (view.uniform() < 0.3), view.uniform(0.87, 1.15), 0.08 * view.normal(2)
    turn = view.uniform(-0.6, 0.6)
    c, s = np.cos(turn) / zoom, np.sin(turn) / zoom
    affine = (flip * c, flip * s, -shift[:, 0]), (-s, c, -shift[:, 1])  # u, v = affine of (x, y, 1)
    x, y = (np.broadcast_to(g, (len(names), *g.shape)) for g in np.meshgrid(grid, grid))
    u, v = (_px(row[0]) * x + _px(row[1]) * y + _px(row[2]) for row in affine)
    draws = _Draws(lesion_uniforms)
    image = _lesion(u, v, partial(_waves, affine, grid, draws), names, draws)
    return np.rint(np.clip(_camera(image, x, y, view, noise), 0, 255)).astype(np.uint8)


def _step(x):
    """Smooth step from 0 to 1 over about -2 <= x <= 2."""
    return 0.5 + 0.5 * np.tanh(x)


def _px(a):
    return a[:, None, None]


def _turned(x, y, angle):
    return _px(np.cos(angle)) * x + _px(np.sin(angle)) * y, _px(np.cos(angle)) * y - _px(np.sin(angle)) * x


def _mix(image, colour, weight):
    """Move image (batch, 3, s, s), in place, towards colour (batch, 3) or (3,) by weight (batch, s, s)."""
    image += (np.reshape(colour, (-1, 3, 1, 1)) - image) * weight[:, None]


def _waves(affine, grid, draws, count, low, high):
    """Smooth noise of unit variance (batch, s, s): plane waves of periods in low..high (half image widths).

    On a pixel grid cos(a x + b y) is a matrix of rank two, so that no cosine is taken per pixel.
    """
    phase, k = draws.uniform(0, 2 * np.pi, count), 2 * np.pi / draws.uniform(low, high, count)
    angle = (np.arange(count) + draws.uniform(0, 1, count)) * np.pi / count  # spread out, against a grain
    kx, ky = k * np.cos(angle), k * np.sin(angle)
    along_x, along_y, constant = (kx * p[:, None] + ky * q[:, None] for p, q in zip(*affine, strict=True))
    x = along_x[:, :, None] * grid + (constant + phase)[:, :, None]
    y = along_y[:, :, None] * grid
    rows, columns = np.concatenate([np.cos(y), -np.sin(y)], 1), np.concatenate([np.cos(x), np.sin(x)], 1)
    return np.matmul(rows.transpose(0, 2, 1), columns) * np.sqrt(2.0 / count)


def _lesion(u, v, waves, names, draws):
    """Skin and lesion (batch, 3, s, s), 0-255, in the lesion's own coordinates u, v."""
    a = _attributes(names, draws)
    look = {name: _px(a[:, i]) for i, name in enumerate(_ABOUT)}
    main, second, spot = a[:, -9:-6], a[:, -6:-3], a[:, -3:]
    tone = draws.uniform()[:, None]
    skin = np.array([232.0, 188.0, 172.0]) - tone * np.array([36.0, 46.0, 56.0]) + 5 * draws.normal(3)
    mottle = 1 + 0.02 * waves(5, 0.5, 1.4) + 0.01 * waves(9, 0.10, 0.25)
    image = np.broadcast_to(skin[:, :, None, None], (*skin.shape, *u.shape[1:])) * mottle[:, None]

    # The border is a stretched circle plus smooth noise and two harmonics that make irregular lesions lopsided.
    x, y = u * (1 + look["elong"]), v / (1 + look["elong"])
    r = np.sqrt(x * x + y * y + 1e-4)
    once = (x + 1j * y) / r
    harmonics = (once**2).real, (once**2).imag, (once**3).real, (once**3).imag
    wobble = sum(_px(height) * wave for height, wave in zip(draws.normal(4).T, harmonics, strict=True))
    rough = waves(8, 0.3, 0.8)
    border = look["size"] * np.maximum(1 + look["irreg"] * (0.5 * wobble + 0.9 * rough), 0.3)
    rho = r / border
    inside = _step((border - r) / look["soft"])

    low = waves(5, 0.35, 0.9)
    tilt = draws.uniform(0, 2 * np.pi)
    along = _turned(u, v, tilt)[0] / look["size"]
    weight = look["radial"] * np.exp(-((rho / 0.55) ** 2)) + look["blotch"] * _step(2.0 * low - 0.6)
    weight = weight + look["side"] * _step(3.0 * along - 0.4 + 0.5 * low)
    body = np.repeat(main[:, :, None, None], u[0].size, axis=3).reshape(image.shape)
    _mix(body, second, np.minimum(weight, 1.0))

    # One warped hexagonal lattice gives both the network (its walls) and the globules (its cells).
    warp = 0.05 * waves(3, 0.5, 0.9), 0.05 * waves(3, 0.5, 0.9)
    turn, period, shift = draws.uniform(0, np.pi), draws.uniform(0.22, 0.30), draws.uniform(0, 2 * np.pi, 3)
    k, shift[:, 2], lattice = 2 * np.pi / period, shift[:, 1] - shift[:, 0], 0.0
    for j in range(3):
        across, _ = _turned(u + warp[0], v + warp[1], turn + j * np.pi / 3)
        lattice = lattice + np.cos(_px(k) * across + _px(shift[:, j]))
    _mix(body, spot, 0.9 * np.minimum(look["glob"], 1) * _step(2.5 * lattice - 1.6))
    ridge = np.cos(_px(2 * np.pi / draws.uniform(0.20, 0.28)) * (along * look["size"] + 0.9 * warp[0]))
    shade = 1 - 0.45 * look["net"] * _step(-1.6 * lattice - 0.8) - 0.18 * look["ridge"] * (1 + ridge)
    shade = shade - 0.40 * look["rim"] * np.exp(-(((rho - 0.85) / 0.16) ** 2))
    body *= np.maximum(shade, 0.2)[:, None]
    vessel = np.exp(-((waves(5, 0.3, 0.6) / 0.22) ** 2))
    _mix(body, np.array([176.0, 44.0, 52.0]), 0.75 * np.minimum(look["vessel"], 1) * vessel)
    flakes = _step(1.6 * waves(10, 0.12, 0.26) - 1.0)
    _mix(body, np.array([240.0, 226.0, 210.0]), 0.75 * np.minimum(look["scale"], 1) * flakes)
    where, angle = draws.uniform(count=SPOTS), draws.uniform(0, 2 * np.pi, SPOTS)
    grow, cover = draws.uniform(0.75, 1.3, SPOTS), 0.0
    for j in range(SPOTS):
        distance = 0.85 * np.sqrt(where[:, j]) * a[:, 0]
        du, dv = u - _px(distance * np.cos(angle[:, j])), v - _px(distance * np.sin(angle[:, j]))
        cover = cover + np.exp(-(((du * du + dv * dv) / (look["spot_r"] * _px(grow[:, j])) ** 2) ** 2))
    _mix(body, spot, np.minimum(look["spots"], 1) * np.minimum(cover, 1.0))
    tint = np.sqrt(skin / 214.0)[:, :, None, None] * mottle[:, None]
    return image + (body * tint - image) * inside[:, None]


def _camera(image, x, y, draws, noise):
    """What differs between two photographs of a lesion besides its position: the same for all classes."""
    there, number = draws.uniform() < 0.25, draws.uniform(0, HAIRS)
    turn, bend = draws.uniform(0, 2 * np.pi), draws.normal(2 * HAIRS)
    centre, cover = draws.uniform(-0.95, 0.95, HAIRS), 0.0
    for j in range(HAIRS):  # parabolas; the hairs of one image run about the same way
        along, across = _turned(x, y, turn + 0.3 * bend[:, 2 * j])
        gap = across - _px(centre[:, j]) - 0.25 * _px(bend[:, 2 * j + 1]) * along * along
        cover = cover + 0.8 * _px(there & (number > j)) * np.exp(-((gap / 0.027) ** 2))
    _mix(image, np.array([60.0, 44.0, 38.0]), np.minimum(cover, 0.8))

    there, side, offset = draws.uniform() < 0.12, draws.uniform(), draws.uniform(0, 2 * np.pi)
    along, across = _turned(x, y, np.pi / 2 * np.floor(4 * side))
    ticks = _step(6 * np.cos(along * 22 + _px(offset)) - 4) * _step(25 * (across - 0.82))
    _mix(image, np.array([40.0, 40.0, 44.0]), 0.8 * _px(there) * ticks)

    # Light: exposure, white balance, a slope over the field, and the black corner of the dermoscope.
    gain = draws.uniform(0.86, 1.10)[:, None] * (1 + 0.025 * draws.normal(3))
    slope = 0.07 * draws.normal(2)
    image = image * (gain[:, :, None, None] * (1 + _px(slope[:, 0]) * x + _px(slope[:, 1]) * y)[:, None])
    dark, edge = draws.uniform() < 0.3, draws.uniform(1.02, 1.22)
    radius = np.sqrt(x * x + y * y)
    image = image * (1 - _px(0.93 * dark) * _step(14 * (radius - _px(edge))))[:, None]
    blur = draws.uniform(0, 0.22)[:, None, None, None]
    for _ in range(2):  # once along each axis; edges repeat
        padded = np.concatenate([image[:, :, :1], image, image[:, :, -1:]], axis=2)
        image = image + blur * (padded[:, :, :-2] + padded[:, :, 2:] - 2 * image)
        image = image.swapaxes(2, 3)
    return image + draws.uniform(1.5, 7.0)[:, None, None, None] * noise
