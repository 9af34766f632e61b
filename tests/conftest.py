"""Environment of the tests, and of the processes they start: set before torch and triton read it."""

import os

# Two threads that spin for each other on a machine that is busy elsewhere are many times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # after the line above

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # without a GPU, Triton kernels run interpreted
