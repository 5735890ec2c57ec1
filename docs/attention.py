"""Draw the pictures of docs/show.md: what a query on scikit-image's cat (by S. van der Walt, CC0) sees.

python docs/attention.py [RUN_OR_NAME ...]

A run's folder is drawn under its network's name; names have random weights.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image
from skimage import data

from hybridzoo.train.show import showing

NETWORKS = ("dinat_mini", "biformer_tiny", "maxvit_tiny", "agent_swin_tiny", "dat_plus_tiny", "overlock_xtiny")
QUERY = "0.49,0.68"  # the nose


def main(networks: list[str]) -> None:
    folder = Path(__file__).parent / "attention"
    with tempfile.TemporaryDirectory() as temporary:
        photo = Path(temporary, "cat.png")
        Image.fromarray(data.chelsea()).save(photo)
        for network in networks:
            is_run = Path(network).exists()
            drawn = Path(temporary, "seen.jpg")
            weights, size = (None, 224) if is_run else ("none", None)
            seen = showing.show(network, photo, drawn, query=QUERY, weights=weights, img_size=size)
            name = showing.find_network(network, weights, size).name
            folder.mkdir(exist_ok=True)
            drawn.replace(folder / f"{name}.jpg")
            print(f"{name}: {len(seen)} layers, {(folder / f'{name}.jpg').stat().st_size // 1000} kB")


if __name__ == "__main__":
    main(sys.argv[1:] or list(NETWORKS))
