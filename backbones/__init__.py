"""One file per family. Importing this package registers every model with timm."""

from hybridzoo.backbones import fusing  # its rules
from hybridzoo.backbones.agent import AgentCSwin, AgentDeiT, AgentPVT, AgentSwin
from hybridzoo.backbones.ascan import AsCAN
from hybridzoo.backbones.biformer import BiFormer
from hybridzoo.backbones.dat import DAT
from hybridzoo.backbones.dinat import DiNAT
from hybridzoo.backbones.dinat_isotropic import IsotropicDiNAT
from hybridzoo.backbones.efficientvit_mit import EfficientViTMIT
from hybridzoo.backbones.efficientvit_msra import EfficientViTMSRA
from hybridzoo.backbones.fastervit import FasterViT
from hybridzoo.backbones.inline import InLineCSwin, InLineDeiT, InLinePVT, InLineSwin
from hybridzoo.backbones.litv2 import LITv2
from hybridzoo.backbones.maxvit import MaxViT
from hybridzoo.backbones.overlock import OverLoCK
from hybridzoo.backbones.patnet import PATNet
from hybridzoo.backbones.ravlt import RAVLT

__all__ = [
    "DAT",
    "RAVLT",
    "AgentCSwin",
    "AgentDeiT",
    "AgentPVT",
    "AgentSwin",
    "AsCAN",
    "BiFormer",
    "DiNAT",
    "EfficientViTMIT",
    "EfficientViTMSRA",
    "FasterViT",
    "InLineCSwin",
    "InLineDeiT",
    "InLinePVT",
    "InLineSwin",
    "IsotropicDiNAT",
    "LITv2",
    "MaxViT",
    "OverLoCK",
    "PATNet",
    "fusing",
]
