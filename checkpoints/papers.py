"""The networks' papers, for citations: title, authors, year and venue by arXiv number."""

from __future__ import annotations

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Paper:
    """One paper.

    Attributes:
        arxiv: the arXiv number.
        title: as published.
        authors: in BibTeX's form, `"A. One and B. Two"`.
        year: of the conference, or of the preprint.
        venue: conference; empty for a preprint.
    """

    arxiv: str
    title: str
    authors: str
    year: int
    venue: str = ""

    def bibtex(self) -> str:
        """The paper as a BibTeX entry."""
        first = self.authors.split(" and ", maxsplit=1)[0].rpartition(" ")[2].lower()
        kind, where = ("inproceedings", f"  booktitle = {{{self.venue}}},\n") if self.venue else ("misc", "")
        return (
            f"@{kind}{{{first}{self.year}_{self.arxiv.replace('.', '_')},\n"
            f"  title = {{{self.title}}},\n"
            f"  author = {{{self.authors}}},\n"
            f"{where}"
            f"  year = {{{self.year}}},\n"
            f"  eprint = {{{self.arxiv}}},\n"
            f"  archivePrefix = {{arXiv}},\n"
            f"  url = {{https://arxiv.org/abs/{self.arxiv}}}\n"
            "}"
        )


_DAT = "Zhuofan Xia and Xuran Pan and Shiji Song and Li Erran Li and Gao Huang"
_PAPERS = (
    Paper("2201.00520", "Vision Transformer with Deformable Attention", _DAT, 2022, "CVPR"),
    Paper(
        "2204.01697",
        "MaxViT: Multi-Axis Vision Transformer",
        "Zhengzhong Tu and Hossein Talebi and Han Zhang and Feng Yang and Peyman Milanfar and Alan Bovik and "
        "Yinxiao Li",
        2022,
        "ECCV",
    ),
    Paper(
        "2204.07143",
        "Neighborhood Attention Transformer",
        "Ali Hassani and Steven Walton and Jiachen Li and Shen Li and Humphrey Shi",
        2023,
        "CVPR",
    ),
    Paper(
        "2205.13213",
        "Fast Vision Transformers with HiLo Attention",
        "Zizheng Pan and Jianfei Cai and Bohan Zhuang",
        2022,
        "NeurIPS",
    ),
    Paper(
        "2205.14756",
        "EfficientViT: Multi-Scale Linear Attention for High-Resolution Dense Prediction",
        "Han Cai and Junyan Li and Muyan Hu and Chuang Gan and Song Han",
        2023,
        "ICCV",
    ),
    Paper("2209.15001", "Dilated Neighborhood Attention Transformer", "Ali Hassani and Humphrey Shi", 2022),
    Paper(
        "2303.08810",
        "BiFormer: Vision Transformer with Bi-Level Routing Attention",
        "Lei Zhu and Xinjiang Wang and Zhanghan Ke and Wayne Zhang and Rynson Lau",
        2023,
        "CVPR",
    ),
    Paper(
        "2305.07027",
        "EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention",
        "Xinyu Liu and Houwen Peng and Ningxin Zheng and Yuqing Yang and Han Hu and Yixuan Yuan",
        2023,
        "CVPR",
    ),
    Paper(
        "2306.06189",
        "FasterViT: Fast Vision Transformers with Hierarchical Attention",
        "Ali Hatamizadeh and Greg Heinrich and Hongxu Yin and Andrew Tao and Jose M. Alvarez and Jan Kautz and "
        "Pavlo Molchanov",
        2024,
        "ICLR",
    ),
    Paper("2309.01430", "DAT++: Spatially Dynamic Vision Transformer with Deformable Attention", _DAT, 2023),
    Paper(
        "2312.08874",
        "Agent Attention: On the Integration of Softmax and Linear Attention",
        "Dongchen Han and Tianzhu Ye and Yizeng Han and Zhuofan Xia and Siyuan Pan and Pengfei Wan and Shiji Song and "
        "Gao Huang",
        2024,
        "ECCV",
    ),
    Paper(
        "2411.04967",
        "AsCAN: Asymmetric Convolution-Attention Networks for Efficient Recognition and Generation",
        "Anil Kag and Huseyin Coskun and Jierun Chen and Junli Cao and Willi Menapace and Aliaksandr Siarohin and "
        "Sergey Tulyakov and Jian Ren",
        2024,
        "NeurIPS",
    ),
    Paper(
        "2411.07635",
        "Breaking the Low-Rank Dilemma of Linear Attention",
        "Qihang Fan and Huaibo Huang and Ran He",
        2025,
        "CVPR",
    ),
    Paper(
        "2412.06590",
        "Bridging the Divide: Reconsidering Softmax and Linear Attention",
        "Dongchen Han and Yifan Pu and Zhuofan Xia and Yizeng Han and Xuran Pan and Xiu Li and Jiwen Lu and Shiji Song "
        "and Gao Huang",
        2024,
        "NeurIPS",
    ),
    Paper(
        "2502.01303",
        "Partial Channel Network: Compute Fewer, Perform Better",
        "Haiduo Huang and Tian Xia and Wenzhe Zhao and Pengju Ren",
        2025,
    ),
    Paper(
        "2502.20087",
        "OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels",
        "Meng Lou and Yizhou Yu",
        2025,
        "CVPR",
    ),
    Paper(
        "2503.03148",
        "Partial Convolution Meets Visual Attention",
        "Haiduo Huang and Fuwei Yang and Dong Li and Ji Liu and Lu Tian and Jinzhang Peng and Pengju Ren "
        "and Emad Barsoum",
        2025,
    ),
)


def find(reference: str) -> Paper | None:
    """The paper that a card names in `paper` (`arXiv:2209.15001`), or None if it is not listed here."""
    number = re.search(r"\d{4}\.\d{5}", reference)
    return next((paper for paper in _PAPERS if number and paper.arxiv == number[0]), None)
