"""anncvt turns a pretrained CNN into an adder neural network (``y = -sum |x - w|``) and ships it."""

from anncvt.runtime.threads import calm_openmp

calm_openmp()  # has to happen before torch is imported
