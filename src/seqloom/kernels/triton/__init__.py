"""The forms called `fused`: Triton kernels, one file per primitive of the same name, imported when one is first launched.

With TRITON_INTERPRET=1 in the environment they run on CPU tensors, slowly: that is how the tests prove them without a GPU.
"""
