"""BatchFormer on MoCo v3 (Hou, Yu and Tao 2022, arXiv:2203.01522).

The module itself is ``models.parts.batchformer``; ``MODEL.BATCHFORMER.ENABLED`` puts it into any other
method.
"""

from models.mocov3 import MoCoV3


class BatchFormerMoCoV3(MoCoV3):
    """MoCo v3 whose encoders hold a BatchFormer before the projector; its options are ``MODEL.MOCOV3``'s."""

    needs_batchformer = True
