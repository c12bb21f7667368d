"""The table of transforms: what an entry of ``transforms`` can name."""

from collections.abc import Callable

from fedsim.transforms.compression import half, qsgd, quantise, random_k, sign, sparse, top_k
from fedsim.transforms.transform import Transform

TRANSFORMS: dict[str, Callable[..., Transform]] = {
    "top-k": top_k,
    "random-k": random_k,
    "qsgd": qsgd,
    "quantise": quantise,
    "sign": sign,
    "half": half,
    "sparse": sparse,
}
