"""Graph passes: plain functions ``Program -> Program``, in the order of :data:`anncvt.passes.pipeline.PIPELINE`."""
