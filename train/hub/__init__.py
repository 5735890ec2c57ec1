"""A trained model as a folder for the Hugging Face hub: written, described, uploaded and read back.

A folder holds `model.safetensors`, `config.json` and the model card `README.md`. A classifier's is timm's own layout
(`local-dir:`, `hf-hub:`); a detector's or segmentor's has the whole model under the names that training gives it. Both
say under the key `hybridzoo` of `config.json` what a checkpoint says of itself (`hybridzoo.train.trained`).
"""
