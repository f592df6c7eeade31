"""The update as one function of tensors: eager, compiled, vectorised over runs, in CUDA graphs."""
