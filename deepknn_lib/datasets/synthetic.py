"""A procedural, dermoscopy-like stand-in for Skin-7: 3,000 synthetic images, no patients.

The set has Skin-7's seven classes in its long-tailed proportions, several looks per class (the table `looks.json`),
several photographs per lesion, some of them near duplicates, and nuisances (hair, vignette, light, blur, noise) that do
not depend on the class. The looks of different classes overlap, so that colour alone does not name the class. Nothing
measured on these images says anything about skin disease.

NumPy guarantees the floating-point numbers of `RandomState` for ever, on every platform. All shapes have smooth edges
and the arithmetic is float64, so the last bit of a platform's `tanh` does not reach the bytes.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from numpy.random import RandomState

LOOKS_FILE = Path(__file__).with_name("looks.json")
_TABLE = json.loads(LOOKS_FILE.read_text(encoding="utf-8"))
_CLASSES, SEED = _TABLE["classes"], 79  # With this seed there are 2,228 lesions, a share as in HAM10000.
CLASS_NAMES = tuple(_CLASSES)
VIEW_SHARES = (0.738, 0.190, 0.066, 0.006)  # lesions with 1, 2, 3, 4 images, about as in HAM10000
TWINS = 0.1  # share of further photographs that repeat the first one's camera and differ by noise only
AMBIGUOUS = 0.30  # share of lesions drawn part of the way towards a look of a confusable class
PULL = (0.25, 0.65)  # how far they go, uniformly; 1 would be that look itself


def describe() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels int64 (N,), ids `<group>_<view>` and groups str (N,); images of a lesion are neighbours."""
    labels, views = np.array(_lesions(), np.int64).T
    groups = [f"lesion_{n:05d}" for n in range(len(views))]
    ids = [f"{group}_{view}" for group, of in zip(groups, views, strict=True) for view in range(1, of + 1)]
    return labels.repeat(views), np.array(ids), np.repeat(groups, views)


def draw(size: int) -> Iterator[np.ndarray]:
    """The photographs of one lesion after the other, the same bytes every time: uint8 (n, 3, size, size), RGB."""
    if not 16 <= size <= 512:
        raise ValueError(f"the lesions are drawn at 16 to 512 pixels, got {size}: 48 is the default")
    for n, (label, views) in enumerate(_lesions()):
        yield np.stack([_photograph(CLASS_NAMES[label], n, view, size) for view in range(views)])


def _lesions() -> list[tuple[int, int]]:
    """The class and the number of photographs of each lesion, in the order of the set."""
    rng, lesions = RandomState(SEED), []
    for label, about in enumerate(_CLASSES.values()):
        left = about["images"]
        while left:
            lesions.append((label, min(1 + rng.choice(4, p=VIEW_SHARES), left)))
            left -= lesions[-1][1]
    return [lesions[n] for n in rng.permutation(len(lesions))]


def _photograph(name: str, lesion: int, view: int, size: int) -> np.ndarray:
    """One photograph, uint8 (3, size, size): position, lesion, hairs, light, vignette, blur and noise."""
    grain = RandomState([SEED, lesion, 1, view])
    rng = RandomState([SEED, lesion, 2, view if grain.rand() > TWINS else 0])
    axis = (np.arange(size) + 0.5) / size * 2 - 1
    zoom = np.exp(1j * rng.uniform(-0.6, 0.6)) / rng.uniform(0.87, 1.15)
    shift = 0.08 * rng.normal(size=2) @ [1, 1j]
    image = _lesion(name, RandomState([SEED, lesion, 0]), axis, zoom, shift)
    z, turn = axis + 1j * axis[:, None], rng.uniform(0, 2 * np.pi)
    # The hairs of one image run about the same way.
    for _ in range(int(rng.uniform(1, 6)) * (rng.rand() < 0.25)):
        hair = z * np.exp(1j * (turn + 0.3 * rng.normal()))
        gap = hair.imag - rng.uniform(-0.95, 0.95) - 0.25 * rng.normal() * hair.real**2
        _paint(image, (60, 44, 38), 0.8 * np.exp(-((gap / 0.027) ** 2)))
    image *= (rng.uniform(0.86, 1.10) * (1 + 0.025 * rng.normal(size=3)))[:, None, None]
    image *= 1 + (0.07 * rng.normal(size=2) @ [1, 1j] * z).real
    image *= 1 - 0.93 * (rng.rand() < 0.3) * _step(14 * (abs(z) - rng.uniform(1.02, 1.22)))
    blur = rng.uniform(0, 0.22)
    for _ in range(2):  # once along each axis
        edges = np.pad(image, ((0, 0), (1, 1), (0, 0)), "edge")
        image = (image + blur * (edges[:, :-2] + edges[:, 2:] - 2 * image)).swapaxes(1, 2)
    image += rng.uniform(1.5, 7.0) * grain.normal(size=image.shape)
    return np.rint(image.clip(0, 255)).astype(np.uint8)


def _lesion(name: str, rng: RandomState, axis: np.ndarray, zoom: complex, shift: complex) -> np.ndarray:
    """Skin and lesion, float64 (3, s, s) of 0 to 255, at the points `zoom * (x + iy) - shift` of the complex plane."""
    look, z = _look(name, rng), zoom * (axis + 1j * axis[:, None]) - shift

    def waves(count: int, low: float, high: float) -> np.ndarray:
        """Smooth noise of unit variance (s, s): plane waves of periods in low..high (half image widths)."""
        direction = np.exp(1j * np.pi * (np.arange(count) + rng.rand(count)) / count)  # against a grain
        k, phase = 2 * np.pi / rng.uniform(low, high, count) * direction, rng.uniform(0, 2 * np.pi, count)
        # A plane wave is a product of one wave along x and one along y, so no cosine is taken per pixel.
        x, y = (np.exp(1j * np.outer((k * d).real, axis)) for d in (zoom, 1j * zoom))
        return (np.exp(1j * phase) * y.T @ x).real * np.sqrt(2 / count)

    skin = np.array([232, 188, 172]) - rng.rand() * np.array([36, 46, 56]) + 5 * rng.normal(size=3)
    mottle = 1 + 0.02 * waves(5, 0.5, 1.4) + 0.01 * waves(9, 0.10, 0.25)
    # The border is a stretched circle plus smooth noise and two harmonics that make irregular lesions lopsided.
    stretched = z.real * (1 + look.elong) + 1j * z.imag / (1 + look.elong)
    radius, once = abs(stretched), stretched / np.sqrt(abs(stretched) ** 2 + 1e-4)
    wobble = sum((rng.normal(size=2) @ [1, 1j] * once**n).real for n in (2, 3))
    border = look.size * np.maximum(1 + look.irreg * (0.5 * wobble + 0.9 * waves(8, 0.3, 0.8)), 0.3)
    inside, rho = _step((border - radius) / look.soft), radius / border

    low, warped = waves(5, 0.35, 0.9), z + 0.05 * (waves(3, 0.5, 0.9) + 1j * waves(3, 0.5, 0.9))
    along = (z * np.exp(1j * rng.uniform(0, 2 * np.pi))).real / look.size
    weight = look.radial * np.exp(-((rho / 0.55) ** 2)) + look.blotch * _step(2.0 * low - 0.6)
    body = np.tile(np.reshape(look.main, (3, 1, 1)), z.shape)
    _paint(body, look.second, weight + look.side * _step(3.0 * along - 0.4 + 0.5 * low))
    # One warped hexagonal lattice gives both the network (its walls) and the globules (its cells).
    turn, phase = np.pi * rng.rand() + np.arange(3) * np.pi / 3, rng.uniform(0, 2 * np.pi, 2)
    k, phases = 2 * np.pi / rng.uniform(0.22, 0.30), (phase[0], phase[1], phase[1] - phase[0])
    lattice = sum(np.cos(k * (warped * np.exp(-1j * t)).real + p) for t, p in zip(turn, phases, strict=True))
    _paint(body, look.spot, 0.9 * look.glob * _step(2.5 * lattice - 1.6))
    ridges = 1 + np.cos(2 * np.pi / rng.uniform(0.20, 0.28) * (warped * np.exp(1j * turn[0])).real)
    rim = 0.40 * look.rim * np.exp(-(((rho - 0.85) / 0.16) ** 2))
    shade = 0.45 * look.net * _step(-1.6 * lattice - 0.8) + 0.18 * look.ridge * ridges + rim
    body *= np.maximum(1 - shade, 0.2)
    _paint(body, (176, 44, 52), 0.75 * look.vessel * np.exp(-((waves(5, 0.3, 0.6) / 0.22) ** 2)))
    _paint(body, (240, 226, 210), 0.75 * look.scale * _step(1.6 * waves(10, 0.12, 0.26) - 1.0))
    for _ in range(6):
        away = z - 0.85 * look.size * np.sqrt(rng.rand()) * np.exp(2j * np.pi * rng.rand())
        reach = look.spot_r * rng.uniform(0.75, 1.3)
        _paint(body, look.spot, look.spots * np.exp(-((abs(away) / reach) ** 4)))
    image = np.tile(skin[:, None, None], z.shape) * mottle
    return image + (body * np.sqrt(skin / 214)[:, None, None] * mottle - image) * inside


def _look(name: str, rng: RandomState) -> SimpleNamespace:
    """How one lesion of a class looks: the attributes of `looks.json` and three colours, each (3,)."""
    others = _CLASSES[name]["confusable"]
    looks = [_CLASSES[one]["looks"] for one in (name, others[int(rng.uniform(0, len(others)))])]
    pair = [rng.choice(of_class, p=[look["share"] for look in of_class]) for of_class in looks]
    pull, shade, mixed = rng.uniform(*PULL) * (rng.rand() < AMBIGUOUS), 12 * rng.normal(size=(3, 1)), {}
    for key, about in _TABLE["attributes"].items():
        own, other = (look.get(key, about["default"]) for look in pair)
        value = own + pull * (other - own) + about["spread"] * rng.normal()
        mixed[key] = np.clip(value, about.get("least", 0), about.get("most", 1))
    for key, change in zip(("main", "second", "spot"), shade, strict=True):
        own, other = (np.array(_TABLE["colours"][look[key]], float) for look in pair)
        mixed[key] = own + pull * (other - own) + change + 5 * rng.normal(size=3)
    return SimpleNamespace(**mixed)


def _step(x: np.ndarray) -> np.ndarray:
    """Smooth step from 0 to 1 over about -2 <= x <= 2."""
    return 0.5 + 0.5 * np.tanh(x)


def _paint(image: np.ndarray, colour, weight: np.ndarray) -> None:
    """Move an image (3, s, s), in place, towards a colour by a weight (s, s) of at most 1."""
    image += (np.reshape(colour, (3, 1, 1)) - image) * np.minimum(weight, 1)
