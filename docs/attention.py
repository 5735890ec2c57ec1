"""Draw the pictures of docs/show.md.

python docs/attention.py [RUN_OR_NAME ...]

Names have random weights; their query is on scikit-image's cat (by S. van der Walt, CC0). A run is the folder of a
classifier of the embedded digits. Its picture gets the name of its network; the query is on a validation image, a 3.
The runs of docs/show.md come from `python benchmarks/one_line.py digits --epochs 1 --only NAME --out FILE`, in its
folder work_dirs/one_line/digits.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from skimage import data

from hybridzoo.train.digits import digits_root
from hybridzoo.train.show import showing

NETWORKS = ("overlock_xtiny",)  # with random weights; the other pictures are of runs
NOSE = "0.49,0.68"  # of the cat
STROKE = "0.45,0.5"  # of the 3


def main(networks: list[str]) -> None:
    folder = Path(__file__).parent / "attention"
    with tempfile.TemporaryDirectory() as temporary:
        cat, three = Path(temporary, "cat.png"), Path(temporary, "three.png")
        Image.fromarray(data.chelsea()).save(cat)
        for network in networks:
            is_run = Path(network).exists()
            drawn = Path(temporary, "seen.png")
            if is_run and not three.exists():
                digits = sorted(digits_root("classification").joinpath("val", "3").iterdir())
                shutil.copy(digits[2], three)
            photo, query, weights, size = (three, STROKE, None, 224) if is_run else (cat, NOSE, "none", None)
            seen = showing.show(network, photo, drawn, query=query, weights=weights, img_size=size)
            name = showing.find_network(network, weights, size).name
            folder.mkdir(exist_ok=True)
            Image.open(drawn).convert("RGB").save(folder / f"{name}.jpg", quality=70, optimize=True)
            print(f"{name}: {len(seen)} layers, {(folder / f'{name}.jpg').stat().st_size // 1000} kB")


if __name__ == "__main__":
    main(sys.argv[1:] or list(NETWORKS))
