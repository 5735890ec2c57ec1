"""Pages of the documentation site that are made of data: see `hook.py` beside this folder."""
