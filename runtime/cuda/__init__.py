"""The CUDA path: how a step gets to a GPU, runs there and comes back.

memory.py   what of the device's memory the KV pool may have
step.py     a step's inputs in buffers that never move; CUDA graphs of small steps
sampler.py  logits -> tokens on the device
runner.py   `CudaRunner`, which puts them together
"""
