"""A trained model as a folder for the Hugging Face hub: writes, describes, uploads and reads it.

A folder holds `model.safetensors`, `config.json` and the model card `README.md`. A classifier's folder has timm's
layout (`local-dir:`, `hf-hub:`). A detector's or segmentor's folder has the whole model, with the tensor names of
training. In both, the key `hybridzoo` of `config.json` holds the setup that checkpoints contain
(`hybridzoo.train.trained`).
"""
