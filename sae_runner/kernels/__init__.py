"""The few hot operations of training, in PyTorch, C++ and Triton: tensors in, tensors out."""
