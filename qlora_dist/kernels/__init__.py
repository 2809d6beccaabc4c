"""One file an op: its Triton kernel and, beside it, the plain PyTorch reference that serves CPUs and float64.

Every public function takes the reference on CPU tensors and on float64, and the kernel on CUDA tensors, launched on
the current device and its current stream; nothing waits for the device. Outputs are given by the caller, may be
strided views (last dimension contiguous) into wider buffers, and are all a function writes to.
"""
