"""Draw docs/neighborhood.png: the keys that a query sees, for two dilations, in the middle and at a corner.

python docs/neighborhood.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap

from hybridzoo.kernels.neighborhood.reference import axis_table

SIDE, KERNEL = 15, 5
QUERIES = {"middle": (7, 7), "corner": (1, 0)}


def main() -> None:
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.4), layout="constrained")
    for axis, (dilation, (place, (row, column))) in zip(
        axes, [(d, q) for d in (1, 2) for q in QUERIES.items()], strict=True
    ):
        keys = [seen for seen, _ in axis_table(SIDE, KERNEL, dilation)]
        picture = np.zeros((SIDE, SIDE))
        picture[np.ix_(keys[row], keys[column])] = 1
        picture[row, column] = 2
        axis.imshow(picture, cmap=ListedColormap(["#eef0f3", "#7fb3e0", "#d9513c"]), vmin=0, vmax=2)
        axis.set_xticks(np.arange(SIDE + 1) - 0.5, labels=[])
        axis.set_yticks(np.arange(SIDE + 1) - 0.5, labels=[])
        axis.grid(color="white", linewidth=1.5)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.set_title(f"dilation {dilation}, {place}", fontsize=12)
    figure.suptitle(
        f"Keys (blue) of one query (red), kernel {KERNEL} x {KERNEL}: at the border the window shifts inward",
        fontsize=12,
    )
    figure.savefig(Path(__file__).parent / "neighborhood.png", dpi=110)


if __name__ == "__main__":
    main()
