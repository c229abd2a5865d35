"""The looks of the synthetic lesions, class by class, as a table; and drawing a lesion's attributes from them."""

from dataclasses import astuple, dataclass
from functools import cache

import numpy as np

CLASS_NAMES = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
CLASS_LONG_NAMES = dict(
    akiec="actinic keratosis / intraepithelial carcinoma", bcc="basal cell carcinoma", bkl="benign keratosis",
    df="dermatofibroma", mel="melanoma", nv="melanocytic nevus", vasc="vascular lesion")
SKIN7_COUNTS = dict(akiec=327, bcc=514, bkl=1099, df=115, mel=1113, nv=6705, vasc=142)
MIN_PER_CLASS = 8
VIEW_SHARES = (0.738, 0.190, 0.066, 0.006)   # lesions with 1, 2, 3, 4 images, about as in HAM10000

# Difficulty.  More spread or more ambiguous lesions make every method worse.
LOOK_SPREAD = 1.0             # multiplies SPREAD, the within-look standard deviation of each attribute
AMBIGUOUS_SHARE = 0.30        # share of lesions drawn part of the way towards a look of a confusable class
AMBIGUOUS_PULL = (0.25, 0.65)  # how far they go, uniformly; 1 would be that look itself
CONFUSABLE = dict(
    akiec=("bcc", "bkl"), bcc=("akiec", "bkl", "nv"), bkl=("nv", "mel", "akiec"), df=("nv", "bcc"),
    mel=("nv", "bkl"), nv=("mel", "bkl", "df"), vasc=("bcc", "mel"))

COLOURS = dict(               # RGB, 0-255
    black=(46, 36, 40), dark_brown=(86, 55, 44), brown=(134, 87, 62), light_brown=(172, 122, 92),
    tan=(196, 152, 114), wax=(190, 150, 104), grey_brown=(140, 120, 108), blue_grey=(108, 110, 126),
    blue_black=(50, 42, 74), pink=(214, 138, 134), pearl=(228, 184, 178), red_pink=(206, 112, 104),
    red=(180, 62, 62), purple=(118, 42, 76), white=(238, 218, 210))


@dataclass(frozen=True)
class Look:
    """One appearance within a class.  Lengths are in half image widths, the rest are strengths, about 0-1."""

    name: str
    share: float               # of the class's lesions
    main: str                  # body colour
    second: str                # colour of the centre, one side or patches: see radial, side, blotch
    spot: str                  # colour of globules and spots
    size: float = 0.45         # radius
    elong: float = 0.10        # elongation
    irreg: float = 0.04        # border irregularity
    soft: float = 0.10         # border softness
    radial: float = 0.0        # second colour at the centre
    side: float = 0.0          # second colour on one side: asymmetry
    blotch: float = 0.0        # second colour in patches
    net: float = 0.0           # dark pigment network
    glob: float = 0.0          # regular globules or cobblestones
    ridge: float = 0.0         # parallel, fingerprint-like ridges
    scale: float = 0.0         # white surface scale
    vessel: float = 0.0        # thin winding red vessels
    spots: float = 0.0         # a few scattered round spots
    spot_r: float = 0.07       # their radius
    rim: float = 0.0           # darker ring at the border


LOOKS = {
    "akiec": (
        Look("scaly pinkish red", .6, "red_pink", "pink", "white", size=.55, irreg=.09, soft=.17, blotch=.4,
             scale=.75, vessel=.15),
        Look("scaly brown", .4, "light_brown", "pink", "white", size=.55, irreg=.09, soft=.14, blotch=.5,
             scale=.65, net=.15)),
    "bcc": (
        Look("pearly with vessels", .6, "pearl", "pink", "blue_grey", size=.52, irreg=.06, soft=.08,
             blotch=.4, vessel=.8, spots=.15, rim=.1),
        Look("pigmented nests", .4, "pink", "light_brown", "blue_black", size=.53, irreg=.09, soft=.08,
             blotch=.5, vessel=.35, spots=.85, spot_r=.10)),
    "bkl": (
        Look("waxy with milia", .4, "brown", "wax", "white", size=.55, irreg=.05, soft=.04, blotch=.5,
             spots=.75, spot_r=.05, scale=.1),
        Look("fingerprint", .35, "light_brown", "tan", "brown", size=.60, irreg=.07, soft=.05, blotch=.2,
             ridge=.8),
        Look("greyish", .25, "grey_brown", "blue_grey", "dark_brown", size=.55, irreg=.08, soft=.08,
             blotch=.6, glob=.35, scale=.15)),
    "df": (
        Look("white centre", .6, "light_brown", "white", "brown", size=.44, irreg=.03, soft=.18, radial=.9,
             net=.25, rim=.4),
        Look("pinkish", .4, "pink", "pearl", "light_brown", size=.41, irreg=.03, soft=.16, radial=.8,
             rim=.5)),
    "mel": (
        Look("multi-coloured", .5, "dark_brown", "blue_grey", "black", size=.69, elong=.2, irreg=.18,
             soft=.07, side=.6, blotch=.6, net=.3, spots=.4, spot_r=.08),
        Look("nevus-like", .3, "brown", "dark_brown", "black", size=.57, elong=.15, irreg=.13, soft=.08,
             side=.6, blotch=.2, net=.5, spots=.3),
        Look("amelanotic pink", .2, "pink", "red_pink", "light_brown", size=.57, elong=.18, irreg=.14,
             soft=.10, side=.6, blotch=.4, vessel=.3, spots=.2)),
    "nv": (
        Look("brown reticular", .5, "brown", "dark_brown", "dark_brown", size=.48, soft=.12, radial=.4,
             net=.65),
        Look("pink globular", .25, "pink", "light_brown", "brown", size=.46, soft=.11, radial=.3, glob=.65),
        Look("dark homogeneous", .25, "dark_brown", "black", "black", size=.46, soft=.10, radial=.4, net=.1)),
    "vasc": (
        Look("red-purple lacunae", .5, "red", "purple", "purple", size=.46, irreg=.05, soft=.06, blotch=.3,
             glob=.8),
        Look("blue-black", .25, "blue_black", "purple", "red", size=.44, irreg=.05, soft=.07, blotch=.4,
             glob=.2),
        Look("bright red", .25, "red", "red_pink", "red", size=.39, soft=.07, radial=.3, glob=.15)),
}
# Within-look standard deviations, in the order of the numeric attributes of Look (size ... rim).
SPREAD = np.array([.075, .07, .025, .025, .15, .14, .15, .14, .12, .10, .12, .12, .14, .012, .10])
FIRST = 5                    # fields of Look before the numeric attributes


class Draws:
    """Hands out the columns of a (batch, n) array of uniforms, in order: (batch, count) or (batch,)."""

    def __init__(self, uniforms):
        self.uniforms, self.used = uniforms, 0

    def uniform(self, low=0.0, high=1.0, count=None):
        """The next column, or the next `count`, stretched to low..high."""
        start, self.used = self.used, self.used + (count or 1)
        assert self.used <= self.uniforms.shape[1]
        block = low + (high - low) * self.uniforms[:, start:self.used]
        return block if count else block[:, 0]

    def normal(self, count):
        """Nearly normal, bounded by +-2 sqrt(3): the sum of four uniforms, which needs no log or cos."""
        four = self.uniform(count=4 * count).reshape(-1, 4, count)
        return (four[:, 0] + four[:, 1] + four[:, 2] + four[:, 3] - 2.0) * np.sqrt(3.0)


def generator(*key):
    """A generator seeded by integers."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


@cache
def _look_vector(look):
    colours = [c for name in (look.main, look.second, look.spot) for c in COLOURS[name]]
    return np.array([*astuple(look)[FIRST:], *colours], dtype=np.float64)


def pick(shares, u):
    """Index drawn with the given shares by the uniform u."""
    return min(int((np.cumsum(shares) / np.sum(shares) <= u).sum()), len(shares) - 1)


def attributes(names, draws):
    """Attribute vectors (batch, 24) of lesions whose class names are given; changes with the difficulty."""
    chosen, ambiguous, which, other_look = draws.uniform(count=4).T
    pull = draws.uniform(*AMBIGUOUS_PULL) * (ambiguous < AMBIGUOUS_SHARE)
    rows = []
    for i, name in enumerate(names):
        own = LOOKS[name][pick([look.share for look in LOOKS[name]], chosen[i])]
        other = LOOKS[CONFUSABLE[name][int(which[i] * len(CONFUSABLE[name]))]]
        other = other[pick([look.share for look in other], other_look[i])]
        rows.append((1.0 - pull[i]) * _look_vector(own) + pull[i] * _look_vector(other))
    rows = np.array(rows)
    n = len(SPREAD)
    rows[:, :n] = np.maximum(rows[:, :n] + LOOK_SPREAD * SPREAD * draws.normal(n), 0.0)
    rows[:, n:] += LOOK_SPREAD * (12.0 * np.repeat(draws.normal(3), 3, axis=1) + 5.0 * draws.normal(9))
    rows[:, 0] = np.clip(rows[:, 0], 0.22, 0.8)
    rows[:, 3], rows[:, 13] = np.maximum(rows[:, 3], 0.03), np.maximum(rows[:, 13], 0.035)
    return rows
