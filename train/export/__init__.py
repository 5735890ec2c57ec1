"""Networks as files that run without hybridzoo: ONNX, `torch.export`, OpenVINO, TorchScript, AOTInductor.

`sources` finds what is to be exported and what a reader has to know of it, `capture` makes a graph for as many image
sizes as the network's arithmetic allows, `formats` writes and opens files, `exporting` puts them together: nothing is
left on the disk that does not compute what PyTorch computes.
"""
