"""Networks as files that run without hybridzoo: ONNX, `torch.export`, OpenVINO, TorchScript, AOTInductor.

`sources` prepares the network and its metadata, and `capture` records a graph for as many image sizes as possible.
`formats` writes and opens files, and `exporting` combines them: a file is kept only if it computes the same as PyTorch.
"""
