"""anncvt turns a pretrained CNN into an adder neural network (``y = -sum |x - w|``) and ships it."""
