"""The functions and classes of the method, and runs, refuse what cannot be meant: the calls stand in bad_input.json."""

from functools import partial
from pkgutil import resolve_name

import pytest
import torch
from sets import REFUSED, refused


@pytest.mark.parametrize(("name", "given", "options", "said"), REFUSED["cannot be meant"])
def test_what_cannot_be_meant_is_refused(name, given, options, said):
    given = [torch.tensor(one) if isinstance(one, list) else one for one in given]
    refused(said, partial(resolve_name(f"deepknn_lib.{name}"), *given, **options), error=ValueError)
