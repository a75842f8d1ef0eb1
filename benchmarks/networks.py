"""The whole networks: torchvision's and timm's own models, unmodified."""

from __future__ import annotations

from functools import partial

from benchmarks.cases import Case
from tinytl_kernels.models import build_model

# The one that every contestant runs, also those that take minutes to compile or that only complete the picture.
FULL_LINEUP = "mobilenet_v2_b8"


def _network(name: str, model: str, batch: int, *, recomputed: bool = False) -> Case:
    make = partial(build_model, model, pretrained=False)
    return Case(f"{name}_b{batch}", "network", make, (batch, 3, 224, 224), recomputed=recomputed)


NETWORKS = (
    _network("mobilenet_v2", "torchvision:mobilenet_v2", 8),
    _network("mobilenet_v2", "torchvision:mobilenet_v2", 1),
    _network("efficientnet_lite0", "timm:efficientnet_lite0", 8),
    _network("mnasnet1_0", "torchvision:mnasnet1_0", 8),
    _network("fbnetc_100", "timm:fbnetc_100", 8),
    _network("resnet50", "torchvision:resnet50", 8),
    _network("mobilenet_v3_large", "torchvision:mobilenet_v3_large", 8, recomputed=True),
    _network("efficientnet_b0", "torchvision:efficientnet_b0", 8, recomputed=True),
)
BY_NAME = {case.name: case for case in NETWORKS}
