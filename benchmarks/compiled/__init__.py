"""What the Triton kernels compile to and which memory they touch, told without a GPU."""
