"""From a language model to a verified TensorRT INT8 engine."""
