"""A prompt and responses to it, for tests of judges."""

import numpy as np

from oapl_jax.preferences import Response
from oapl_jax.structs import Prompt

PROMPT = Prompt("id7", 7, np.array([2, 3], np.int32), "1+2=", "3", "chain_sum")


def responses(*texts, right=()):
    return [Response(text, lambda text=text: float(text in right)) for text in texts]
