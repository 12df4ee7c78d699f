"""BatchFormer on MoCo v3 (Hou, Yu and Tao 2022, arXiv:2203.01522).

The module is in `models.parts.batchformer`. `MODEL.BATCHFORMER.ENABLED` puts it into any method.
"""

from models.mocov3 import MoCoV3


class BatchFormerMoCoV3(MoCoV3):
    """MoCo v3 with a BatchFormer before the projector. Its options are those of `MODEL.MOCOV3`."""

    needs_batchformer = True
