"""Without a GPU the kernels are interpreted, which must be said before Triton is imported.

One thread, for the tensors are small.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)
