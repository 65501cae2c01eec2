"""How an adder network executes: the op, its kernels, ONNX, TVM."""
