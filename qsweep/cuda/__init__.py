"""Integer inference on NVIDIA GPUs: kernels in Triton and what calls them.

Every integer result equals that of the `reference` engine, bit for bit. Needs torch, triton and numpy, nothing else of
qsweep's requirements, so that it also runs in a bare CUDA image.
"""
