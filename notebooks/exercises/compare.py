"""How the exercises check an answer."""

import numpy as np


def compare(given, right, tolerance: float = 1e-6) -> bool:
    """Say whether the answer to an exercise is right, else how far off, and return it; what is right stays unsaid.

    Numbers and arrays (of one shape, or ValueError) may differ by `tolerance`, relative to the largest; anything else
    has to be equal.
    """
    try:
        one, other = np.asarray(given, float), np.asarray(right, float)
    except (TypeError, ValueError):
        told = "" if given == right else f"{given!r} is not it"
    else:
        if one.shape != other.shape:
            raise ValueError(f"the answer has shape {one.shape}; the exercise asks for {other.shape}")
        off = np.abs(one - other).max(initial=0) / max(np.abs(other).max(initial=0), 1e-12)
        told = "" if off <= tolerance else f"off by {100 * off:.3g} % (of the largest right value)"
    print(f"not yet: {told}" if told else "right")
    return not told
