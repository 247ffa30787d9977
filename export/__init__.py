"""A model (Hugging Face folder, GGUF, torch module, ONNX file) to an ONNX artifact on disk."""
