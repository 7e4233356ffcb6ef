"""CPU kernels compiled by numba at first use (pip install 'seqloom[native]'): one file per primitive that has one.

Imported only when a form that needs them runs. Each is kept because it is at least twice as fast as the PyTorch form.
"""
